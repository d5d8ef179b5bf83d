package configs

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestAuthIsValidated(t *testing.T) {
	t.Setenv("HONE_HOME", t.TempDir())
	path := filepath.Join(t.TempDir(), "own.yaml")
	hash := strings.Repeat("ab", 32)
	write(t, path, "keys:\n- {name: laptop, sha256: "+hash+", scopes: [infer]}\n- {name: laptop, sha256: "+hash+", scopes: []}\n"+
		"- {name: \"a b\", sha256: sk-hone-plain, scopes: [infer, root], expires: never}\n- sk-hone-bare\n"+
		"cors_origins: ['*', 'null', https://a.example/, HTTPS://a.example, ftp://a.example]\ntls: {cert_file: a.pem}\n"+
		"limits: {body: 5B, header_timeout: 0, body_timeout: -1s, write_timeout: 0}\n")
	_, err := Load(Sources{File: path})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{`unknown key "expires" in keys[2]`, "keys[3] is no object", "keys: its value does not have"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in the error:\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "sk-hone-plain") {
		t.Errorf("the error shows a key:\n%v", err)
	}
	cfg, err := Default()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Keys = []Key{
		{Name: "laptop", SHA256: hash, Scopes: []string{"infer"}}, {Name: "laptop", SHA256: strings.ToUpper(hash)},
		{Name: "a b", SHA256: "sk-hone-plain", Scopes: []string{"infer", "root"}},
	}
	cfg.CORSOrigins = []string{"*", "null", "https://a.example/", "HTTPS://a.example", "ftp://a.example", "https://a.example", "http://localhost:3000"}
	cfg.APIKey = "with a space"
	cfg.TLS.CertFile, cfg.Limits = "a.pem", Limits{Body: "5B"}
	err = cfg.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		"api_key: a secret with spaces", `keys[1].name: "laptop"`, "keys[1].sha256: the hash of another", "keys[1].scopes: none", `keys[2].name: "a b"`, "keys[2].sha256: something else", `keys[2].scopes: "root"`,
		`cors_origins: "*"`, `cors_origins: "null"`, `cors_origins: "https://a.example/"`, `cors_origins: "HTTPS://a.example"`, `cors_origins: "ftp://a.example"`,
		`tls: cert_file "a.pem"`, `limits.body: "5B"`, "limits.header_timeout: 0s", "limits.body_timeout: 0s", "limits.write_timeout: 0s",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in the error:\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "sk-hone-plain") || strings.Contains(err.Error(), "with a space") || strings.Contains(err.Error(), `cors_origins: "https://a.example",`) || strings.Contains(err.Error(), "localhost:3000\",") {
		t.Errorf("the error shows a key, or blames a right origin:\n%v", err)
	}
}
