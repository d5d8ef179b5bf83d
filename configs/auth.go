package configs

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Key is an API key, of which only the hash is known.
type Key struct {
	Name   string   `mapstructure:"name"`
	SHA256 string   `mapstructure:"sha256"` // of the key, 64 hexadecimal digits
	Scopes []string `mapstructure:"scopes"`
}

// TLS names the files of a certificate and its key; both are empty for plain HTTP.
type TLS struct {
	CertFile string `mapstructure:"cert_file"`
	KeyFile  string `mapstructure:"key_file"`
}

// Limits bound what one request may send, and how slowly.
type Limits struct {
	Body          string        `mapstructure:"body"`
	HeaderTimeout time.Duration `mapstructure:"header_timeout"`
	BodyTimeout   time.Duration `mapstructure:"body_timeout"`
	WriteTimeout  time.Duration `mapstructure:"write_timeout"`
}

// BodyBytes is Body as a number.
func (l Limits) BodyBytes() int64 { return bytesOf(l.Body) }

// Scopes are all that a key can have: what they allow is for package server to say.
func Scopes() []string { return []string{"infer", "train", "admin"} }

// Authenticates reports whether requests need a key.
func (c *Config) Authenticates() bool { return c.APIKey != "" || len(c.Keys) > 0 }

// Loopback reports whether only this machine can reach the server.
func (c *Config) Loopback() bool {
	ip := net.ParseIP(c.Host)
	return c.Host == "localhost" || ip != nil && ip.IsLoopback()
}

// minAPIKey keeps a key that other machines can try from being guessed. Keys of `hone key new` are longer.
const minAPIKey = 16

// keyName is what a key may be called: its name stands in the log.
var keyName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

func (c *Config) validateAuth(bad func(key string, value any, expected string)) {
	if c.APIKey != "" && !c.Loopback() && len(c.APIKey) < minAPIKey {
		bad("api_key", fmt.Sprintf("a secret of %d characters", len(c.APIKey)), fmt.Sprintf("at least %d, since other machines can try to guess it; hone key new makes one", minAPIKey))
	}
	if strings.ContainsFunc(c.APIKey, func(r rune) bool { return r <= ' ' || r > '~' }) {
		bad("api_key", "a secret with spaces or characters beyond ASCII", "one that fits into an HTTP header")
	}
	names, hashes := map[string]bool{}, map[string]bool{}
	for i, k := range c.Keys {
		at := fmt.Sprintf("keys[%d]", i)
		if !keyName.MatchString(k.Name) {
			bad(at+".name", fmt.Sprintf("%q", k.Name), "1 to 64 letters, digits and . _ -")
		} else if names[k.Name] {
			bad(at+".name", fmt.Sprintf("%q", k.Name), "a name that no other key has")
		}
		hash := strings.ToLower(k.SHA256)
		// The value is not shown: it may be a key that was put here in place of its hash.
		if sum, err := hex.DecodeString(hash); err != nil || len(sum) != 32 {
			bad(at+".sha256", "something else", "the 64 hexadecimal digits that hone key new prints")
		} else if hashes[hash] {
			bad(at+".sha256", "the hash of another key", "one of its own")
		}
		names[k.Name], hashes[hash] = true, true
		if len(k.Scopes) == 0 {
			bad(at+".scopes", "none", "one or more of "+strings.Join(Scopes(), ", "))
		}
		for _, scope := range k.Scopes {
			if !slices.Contains(Scopes(), scope) {
				bad(at+".scopes", fmt.Sprintf("%q", scope), "one or more of "+strings.Join(Scopes(), ", "))
			}
		}
	}
	for _, origin := range c.CORSOrigins {
		if u, err := url.Parse(origin); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || strings.ToLower(u.Scheme+"://"+u.Host) != origin {
			bad("cors_origins", fmt.Sprintf("%q", origin), "an exact origin in lower case, such as https://app.example.com or http://localhost:3000, without a path")
		}
	}
	if (c.TLS.CertFile == "") != (c.TLS.KeyFile == "") {
		bad("tls", fmt.Sprintf("cert_file %q, key_file %q", c.TLS.CertFile, c.TLS.KeyFile), "both or neither")
	}
	if n, err := parseBytes(c.Limits.Body); err != nil || n < 1<<10 || n > 1<<30 {
		bad("limits.body", fmt.Sprintf("%q", c.Limits.Body), "a size from 1KiB to 1GiB, such as 32MiB")
	}
	for _, d := range []struct {
		key   string
		value time.Duration
	}{
		{"limits.header_timeout", c.Limits.HeaderTimeout}, {"limits.body_timeout", c.Limits.BodyTimeout}, {"limits.write_timeout", c.Limits.WriteTimeout},
	} {
		if d.value <= 0 {
			bad(d.key, d.value, "a positive duration such as 30s")
		}
	}
}

// unknownInKeys returns an error for each misspelt field of an API key in the file: viper takes a list as one value.
func unknownInKeys(list any, path string) []error {
	entries, ok := list.([]any)
	if !ok {
		return nil // decode says what is wrong with it
	}
	var errs []error
	for i, entry := range entries {
		fields, ok := entry.(map[string]any)
		if !ok {
			errs = append(errs, fmt.Errorf("%s: keys[%d] is no object of name, sha256 and scopes", path, i))
			continue
		}
		for _, field := range slices.Sorted(maps.Keys(fields)) {
			if !slices.Contains([]string{"name", "sha256", "scopes"}, field) {
				errs = append(errs, fmt.Errorf("%s: unknown key %q in keys[%d]; a key has name, sha256 and scopes", path, field, i))
			}
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return []error{errors.Join(errs...)}
}
