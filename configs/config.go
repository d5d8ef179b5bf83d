// Package configs reads hone's configuration: built-in defaults, then a file, then the environment, then flags.
// default.yaml is the reference of every key.
//
//	cfg, err := configs.Load(configs.Sources{File: path, Flags: map[string]any{"port": 9000}})
package configs

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/viper"
)

//go:embed default.yaml
var defaultYAML []byte

// FileName is the configuration file that Load looks for in the data directory.
const FileName = "hone.yaml"

// Config is hone's configuration. Each field is described at its key in default.yaml.
type Config struct {
	DataDir       string        `mapstructure:"data_dir"` // absolute
	Host          string        `mapstructure:"host"`
	Port          int           `mapstructure:"port"`
	AllowedHosts  []string      `mapstructure:"allowed_hosts"`
	CORSOrigins   []string      `mapstructure:"cors_origins"`
	APIKey        string        `mapstructure:"api_key"`
	Keys          []Key         `mapstructure:"keys"`
	TLS           TLS           `mapstructure:"tls"`
	Limits        Limits        `mapstructure:"limits"`
	DefaultModel  string        `mapstructure:"default_model"`
	Memory        string        `mapstructure:"memory"` // auto, or a size
	ContextTokens int           `mapstructure:"context_tokens"`
	ContextOf     []string      `mapstructure:"model_context_tokens"` // NAME=TOKENS
	Sequences     int           `mapstructure:"sequences"`
	Threads       int           `mapstructure:"threads"`
	Device        string        `mapstructure:"device"` // auto, cpu, cuda
	LoadTimeout   time.Duration `mapstructure:"load_timeout"`
	ShutdownGrace time.Duration `mapstructure:"shutdown_grace"`
	Runner        Runner        `mapstructure:"runner"`
	Trainer       Trainer       `mapstructure:"trainer"`
	Retention     Retention     `mapstructure:"retention"`
	Log           Log           `mapstructure:"log"`
}

// Runner says how base models are kept in memory and served.
type Runner struct {
	IdleTimeout   time.Duration `mapstructure:"idle_timeout"`
	Wait          time.Duration `mapstructure:"wait"`
	HangTimeout   time.Duration `mapstructure:"hang_timeout"`
	Engine        string        `mapstructure:"engine"`     // auto, own, llama
	CacheType     string        `mapstructure:"cache_type"` // f16, q8_0
	CacheTokens   int           `mapstructure:"cache_tokens"`
	GPUWeights    string        `mapstructure:"gpu_weights"` // stored, bf16
	Queue         int           `mapstructure:"queue"`
	AdapterMemory string        `mapstructure:"adapter_memory"`
}

// AdapterBytes is AdapterMemory as a number; 0 is the default.
func (r Runner) AdapterBytes() int64 { return bytesOf(r.AdapterMemory) }

// Trainer says what fine-tuning jobs compute on.
type Trainer struct {
	Device string `mapstructure:"device"`
	Memory string `mapstructure:"memory"`
	Cache  string `mapstructure:"cache"` // a size
}

// MemoryBytes is Memory as a number; 0 is what is free.
func (t Trainer) MemoryBytes() int64 { return bytesOf(t.Memory) }

// CacheBytes is Cache as a number; 0 is no bound.
func (t Trainer) CacheBytes() int64 { return bytesOf(t.Cache) }

// Retention says how long what jobs and uploads leave behind is kept.
type Retention struct {
	ResumeStates time.Duration `mapstructure:"resume_states"`
	Checkpoints  time.Duration `mapstructure:"checkpoints"`
	Events       time.Duration `mapstructure:"events"`
	Files        time.Duration `mapstructure:"files"`
}

// MemoryBytes is Memory as a number; 0 is automatic.
func (c *Config) MemoryBytes() int64 {
	if c.Memory == automatic {
		return 0
	}
	return bytesOf(c.Memory)
}

// ContextTokensOf is ContextOf as numbers by name.
func (c *Config) ContextTokensOf() map[string]int {
	tokens, err := c.contextTokensOf()
	if err != nil {
		return nil // Validate has refused it
	}
	return tokens
}

func (c *Config) contextTokensOf() (map[string]int, error) {
	tokens := map[string]int{}
	for _, entry := range c.ContextOf {
		name, number, ok := strings.Cut(entry, "=")
		name = strings.TrimSpace(name)
		n, err := strconv.Atoi(strings.TrimSpace(number))
		if !ok || err != nil || name == "" || n < 1 || n > maxContextTokens {
			return nil, fmt.Errorf("%q is no NAME=TOKENS", entry)
		}
		if _, twice := tokens[name]; twice {
			return nil, fmt.Errorf("%q is there twice", name)
		}
		tokens[name] = n
	}
	return tokens, nil
}

const (
	automatic        = "auto"
	maxContextTokens = 1 << 20
)

// bytesOf is parseBytes of what Validate has let pass.
func bytesOf(text string) int64 {
	n, err := parseBytes(text)
	if err != nil {
		return 0
	}
	return n
}

// parseBytes reads a size such as 12GiB; "" is 0.
func parseBytes(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := humanize.ParseBytes(text)
	if err != nil || n > 1<<50 {
		return 0, fmt.Errorf("%q is no size", text)
	}
	return int64(n), nil
}

// Log says what is logged and how.
type Log struct {
	Level  string `mapstructure:"level"`
	Format string `mapstructure:"format"`
}

// Sources says where Load reads beside the defaults and the environment.
type Sources struct {
	File  string         // must exist; "": hone.yaml in the data directory, if there is one
	Flags map[string]any // by key; they win over everything
}

// DefaultYAML returns the text of default.yaml.
func DefaultYAML() string { return string(defaultYAML) }

// Default returns the configuration of a machine without a file and environment.
func Default() (Config, error) { return decode(newViper(), "") }

// Load reads and validates the configuration. The error names every unknown key, wrong type and wrong value at once.
func Load(src Sources) (Config, error) {
	v := newViper()
	v.SetEnvPrefix("HONE")
	v.SetEnvKeyReplacer(strings.NewReplacer(".", "_"))
	v.AutomaticEnv()
	if err := v.BindEnv("data_dir", "HONE_HOME", "HONE_DATA_DIR"); err != nil {
		return Config{}, fmt.Errorf("bind HONE_HOME: %w", err)
	}
	// Viper takes an empty variable for one that is not there. For this key it means something: none.
	if name, ok := os.LookupEnv("HONE_DEFAULT_MODEL"); ok && name == "" {
		v.Set("default_model", "")
	}
	for key, value := range src.Flags {
		v.Set(key, value)
	}
	file, unknown, err := mergeFile(v, src.File)
	if err != nil {
		return Config{}, err
	}
	cfg, err := decode(v, file)
	if err := errors.Join(append(unknown, err)...); err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	return cfg, nil
}

func newViper() *viper.Viper {
	v := viper.New()
	v.SetConfigType("yaml")
	if err := v.ReadConfig(bytes.NewReader(defaultYAML)); err != nil {
		panic("default.yaml: " + err.Error()) // embedded: a test reads it too
	}
	return v
}

// mergeFile adds the configuration file to v. It returns its path ("" if there is none) and an error for each key that
// default.yaml lacks.
func mergeFile(v *viper.Viper, path string) (string, []error, error) {
	named := path != ""
	if !named {
		// Without a data directory there is no file in it; decode reports the former, with all else.
		dir, err := dataDir(v.GetString("data_dir"))
		path = filepath.Join(dir, FileName)
		if err != nil {
			path = os.DevNull
		}
	}
	data, err := os.ReadFile(path)
	if !named && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)) {
		return "", nil, nil
	}
	if err != nil {
		return "", nil, fmt.Errorf("read the configuration: %w", err)
	}
	own := viper.New()
	own.SetConfigType("yaml")
	if err := own.ReadConfig(bytes.NewReader(data)); err != nil {
		return "", nil, fmt.Errorf("read the configuration %s: %w", path, err)
	}
	known := newViper().AllKeys()
	unknown := unknownInKeys(own.Get("keys"), path)
	for _, key := range slices.Sorted(slices.Values(own.AllKeys())) {
		if !slices.Contains(known, key) {
			unknown = append(unknown, fmt.Errorf("%s: unknown key %q; the keys are %s", path, key, strings.Join(slices.Sorted(slices.Values(known)), ", ")))
		}
	}
	if err := v.MergeConfigMap(own.AllSettings()); err != nil {
		return "", nil, fmt.Errorf("read the configuration %s: %w", path, err)
	}
	return path, unknown, nil
}

// decode turns the settings into a Config, key by key so that one wrong type does not hide another, and validates it.
func decode(v *viper.Viper, file string) (Config, error) {
	var cfg Config
	var errs []error
	settings := v.AllSettings()
	if err := v.Unmarshal(&cfg); err != nil {
		for _, key := range slices.Sorted(maps.Keys(settings)) {
			decoder, err := mapstructure.NewDecoder(&mapstructure.DecoderConfig{
				Result: new(Config), WeaklyTypedInput: true,
				DecodeHook: mapstructure.ComposeDecodeHookFunc(mapstructure.StringToTimeDurationHookFunc(), mapstructure.StringToSliceHookFunc(",")),
			})
			if err != nil {
				return Config{}, err
			}
			if err := decoder.Decode(map[string]any{key: settings[key]}); err != nil {
				value := fmt.Sprint(settings[key])
				if key == "keys" || key == "api_key" {
					value = "its value" // which may hold a secret
				}
				errs = append(errs, fmt.Errorf("%s: %s does not have the right type%s: default.yaml shows it", key, value, inFile(file)))
			}
		}
		return Config{}, errors.Join(errs...)
	}
	dir, err := dataDir(cfg.DataDir)
	if err != nil {
		errs = append(errs, err)
	}
	cfg.DataDir = dir
	return cfg, errors.Join(append(errs, cfg.Validate())...)
}

func inFile(file string) string {
	if file == "" {
		return ""
	}
	return " (is it set in " + file + "?)"
}

// dataDir makes the data directory absolute; "" is the user's. It need not exist, but must not be something else.
func dataDir(dir string) (string, error) {
	if dir == "" {
		data := os.Getenv("XDG_DATA_HOME")
		if !filepath.IsAbs(data) { // the specification says to ignore a relative one
			home, err := os.UserHomeDir()
			if err != nil {
				return "", fmt.Errorf("data_dir: no home directory for the default (%w); set HONE_HOME", err)
			}
			data = filepath.Join(home, ".local", "share")
		}
		return filepath.Join(data, "hone"), nil
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("data_dir %q: %w", dir, err)
	}
	// Here, since what is done in it would fail with words about files that nobody has heard of.
	switch info, err := os.Stat(abs); {
	case err == nil && !info.IsDir():
		return "", fmt.Errorf("the data directory %s is a file, expected a directory; name another with --data-dir or HONE_HOME", abs)
	case errors.Is(err, syscall.ENOTDIR):
		return "", fmt.Errorf("the data directory %s lies below a file, expected a directory; name another with --data-dir or HONE_HOME", abs)
	}
	return abs, nil
}

// minMemory is the least budget with which any model can be served.
const minMemory = 64 << 20

// Validate reports every value that cannot work, each with its key.
func (c *Config) Validate() error {
	var errs []error
	bad := func(key string, value any, expected string) {
		errs = append(errs, fmt.Errorf("%s: %v, expected %s", key, value, expected))
	}
	if c.Port < 0 || c.Port > 65535 {
		bad("port", c.Port, "0 (any free one) to 65535")
	}
	switch {
	case c.Host == "":
		bad("host", `""`, "an address such as 127.0.0.1; 0.0.0.0 is all of this machine's")
	case !c.Loopback() && !c.Authenticates():
		bad("host", c.Host, "a loopback address, because no API key is configured and other machines could reach this one. "+
			"Either keep 127.0.0.1 and reach it through ssh -L; or make a key with hone key new NAME and put its line under keys: in "+FileName+
			"; or set HONE_API_KEY to a secret of at least "+strconv.Itoa(minAPIKey)+" characters")
	}
	c.validateAuth(bad)
	if strings.ContainsAny(c.DefaultModel, ":\\ \t\n") {
		bad("default_model", fmt.Sprintf("%q", c.DefaultModel), "a model's name or owner/repository/file.gguf")
	}
	for _, number := range []struct {
		key        string
		value, max int
	}{
		{"context_tokens", c.ContextTokens, maxContextTokens}, {"sequences", c.Sequences, 256}, {"threads", c.Threads, 1024},
		{"runner.cache_tokens", c.Runner.CacheTokens, 1 << 24}, {"runner.queue", c.Runner.Queue, 1 << 16},
	} {
		if number.value < 0 || number.value > number.max {
			bad(number.key, number.value, fmt.Sprintf("0 (automatic) to %d", number.max))
		}
	}
	if c.LoadTimeout <= 0 {
		bad("load_timeout", c.LoadTimeout, "a positive duration such as 5m")
	}
	if c.ShutdownGrace < 0 {
		bad("shutdown_grace", c.ShutdownGrace, "a duration such as 10s")
	}
	for _, d := range []struct{ key, value string }{{"device", c.Device}, {"trainer.device", c.Trainer.Device}} {
		if devices := []string{"auto", "cpu", "cuda"}; !slices.Contains(devices, d.value) {
			bad(d.key, fmt.Sprintf("%q", d.value), "one of "+strings.Join(devices, ", "))
		}
	}
	if _, err := parseBytes(c.Trainer.Memory); err != nil {
		bad("trainer.memory", fmt.Sprintf("%q", c.Trainer.Memory), "0 (what is free) or a size such as 12GiB")
	}
	if _, err := parseBytes(c.Trainer.Cache); err != nil {
		bad("trainer.cache", fmt.Sprintf("%q", c.Trainer.Cache), "0 (no bound) or a size such as 4GiB")
	}
	if n, err := parseBytes(c.Memory); c.Memory != automatic && (err != nil || n < minMemory) {
		bad("memory", fmt.Sprintf("%q", c.Memory), "auto, or a size such as 12GiB, at least "+humanize.IBytes(minMemory))
	}
	if _, err := c.contextTokensOf(); err != nil {
		bad("model_context_tokens", err, fmt.Sprintf("a list of NAME=TOKENS, with 1 to %d tokens", maxContextTokens))
	}
	for _, d := range []struct {
		key          string
		value, least time.Duration
		expected     string
	}{
		{"runner.idle_timeout", c.Runner.IdleTimeout, 0, "0 (never) or a duration such as 10m"},
		{"runner.wait", c.Runner.Wait, 1, "a positive duration such as 1m"},
		{"runner.hang_timeout", c.Runner.HangTimeout, time.Second, "a duration of at least 1s, such as 2m"},
		{"retention.resume_states", c.Retention.ResumeStates, 0, "0 (none) or a duration such as 168h"},
		{"retention.checkpoints", c.Retention.Checkpoints, 0, "0 (for good) or a duration such as 720h"},
		{"retention.events", c.Retention.Events, 0, "0 (for good) or a duration such as 720h"},
		{"retention.files", c.Retention.Files, 0, "0 (for good) or a duration such as 720h"},
	} {
		if d.value < d.least {
			bad(d.key, d.value, d.expected)
		}
	}
	if engines := []string{automatic, "own", "llama"}; !slices.Contains(engines, c.Runner.Engine) {
		bad("runner.engine", fmt.Sprintf("%q", c.Runner.Engine), "one of "+strings.Join(engines, ", "))
	}
	if types := []string{"f16", "q8_0"}; !slices.Contains(types, c.Runner.CacheType) {
		bad("runner.cache_type", fmt.Sprintf("%q", c.Runner.CacheType), "one of "+strings.Join(types, ", "))
	}
	if kinds := []string{"stored", "bf16"}; !slices.Contains(kinds, c.Runner.GPUWeights) {
		bad("runner.gpu_weights", fmt.Sprintf("%q", c.Runner.GPUWeights), "one of "+strings.Join(kinds, ", "))
	}
	if _, err := parseBytes(c.Runner.AdapterMemory); err != nil {
		bad("runner.adapter_memory", fmt.Sprintf("%q", c.Runner.AdapterMemory), "a size such as 256MiB")
	}
	if levels := []string{"debug", "info", "warn", "error"}; !slices.Contains(levels, c.Log.Level) {
		bad("log.level", fmt.Sprintf("%q", c.Log.Level), "one of "+strings.Join(levels, ", "))
	}
	if formats := []string{"text", "json"}; !slices.Contains(formats, c.Log.Format) {
		bad("log.format", fmt.Sprintf("%q", c.Log.Format), "one of "+strings.Join(formats, ", "))
	}
	return errors.Join(errs...)
}
