package app

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/client"
	"github.com/hone-llm/hone/configs"
)

// log is a logger's output.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) { l.mu.Lock(); defer l.mu.Unlock(); return l.text.Write(p) }

func (l *log) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.text.String() }

// TestKeys serves on all addresses with two keys, looks at /metrics meanwhile, and searches the log and the data for the keys.
func TestKeys(t *testing.T) {
	const owner, chatter = "a-secret-of-the-environment", "sk-hone-secret-of-the-list"
	t.Setenv("HONE_API_KEY", owner) // as a real server has it, which starts its children from there
	cfg := config(t)
	cfg.Host, cfg.APIKey = "0.0.0.0", owner
	sum := sha256.Sum256([]byte(chatter))
	cfg.Keys = []configs.Key{{Name: "chatter", SHA256: strings.ToUpper(hex.EncodeToString(sum[:])), Scopes: []string{"infer"}}}
	var lines log
	addModel(t, cfg.DataDir)
	a := New(cfg, Options{Env: []string{smallRoles}, Logger: slog.New(slog.NewJSONHandler(&lines, &slog.HandlerOptions{Level: slog.LevelDebug})), Stderr: &lines})
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Stop(context.Background()) })

	if text, err := chat(t, client.New(a.URL()+"/v1", chatter).Client, "small", "hello"); err != nil || text != "hello " {
		t.Errorf("with the key: %q, %v", text, err)
	}
	apiError := new(openai.APIError)
	if _, err := chat(t, client.New(a.URL()+"/v1", "").Client, "small", "hello"); !errors.As(err, &apiError) || apiError.HTTPStatusCode != 401 || apiError.Code != "invalid_api_key" {
		t.Errorf("without a key: %v", err)
	}
	if _, _, err := client.New(a.URL()+"/v1", chatter).Jobs(t.Context(), "", 1); err == nil || !strings.Contains(err.Error(), "scope train") {
		t.Errorf("with a key of another scope: %v", err)
	}
	if status, body := get(t, http.DefaultClient, a.URL()+"/ready", ""); status != 200 {
		t.Errorf("ready: %d %s", status, body)
	}
	status, body := get(t, http.DefaultClient, a.URL()+"/metrics", owner)
	for _, want := range []string{`hone_runner_ready{model="small"} 1`, `hone_jobs{status="succeeded"} 0`, `hone_generation_tokens_total{model="small"} 1`, `hone_runner_memory_bytes{model="small"}`, `hone_queue_depth{model="small"} 0`, `hone_cache_free_tokens{model="small"} 60`} {
		if status != 200 || !strings.Contains(body, want) {
			t.Errorf("metrics: %d, no %s in\n%s", status, want, body)
		}
	}
	for _, pid := range children(t) {
		environment, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil || bytes.Contains(environment, []byte(owner)) {
			t.Errorf("child %d has the key in its environment, or it cannot be read: %v", pid, err)
		}
	}
	if err := a.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if text := lines.String(); strings.Contains(text, owner) || strings.Contains(text, chatter) || !strings.Contains(text, `"key":"chatter"`) || !strings.Contains(text, "without TLS") {
		t.Errorf("the log has a key, or lacks the name of one:\n%s", text)
	}
	err := filepath.WalkDir(cfg.DataDir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(owner)) || bytes.Contains(data, []byte(chatter)) {
			t.Errorf("%s has a key", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestListedKeyInTheEnvironment: it has the scopes of the list, not all.
func TestListedKeyInTheEnvironment(t *testing.T) {
	t.Parallel()
	sum := sha256.Sum256([]byte("sk-hone-client"))
	listed := configs.Key{Name: "client", SHA256: hex.EncodeToString(sum[:]), Scopes: []string{"infer"}}
	if got := keys(&configs.Config{APIKey: "sk-hone-client", Keys: []configs.Key{listed}}); len(got) != 1 || got[0].Name != "client" || len(got[0].Scopes) != 1 {
		t.Errorf("keys %+v", got)
	}
	if got := keys(&configs.Config{APIKey: "sk-hone-other", Keys: []configs.Key{listed}}); len(got) != 2 || got[1].Hash != sha256.Sum256([]byte("sk-hone-other")) {
		t.Errorf("keys %+v", got)
	}
}

func get(t *testing.T, client *http.Client, url, key string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// writeCertificate writes a self-signed certificate of 127.0.0.1 with its key, and returns it.
func writeCertificate(t *testing.T, certFile, keyFile string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "hone"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for path, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestTLS(t *testing.T) {
	cfg := config(t)
	dir := t.TempDir()
	cfg.TLS = configs.TLS{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	failing := New(cfg, Options{})
	if err := failing.Start(t.Context()); err == nil || !strings.Contains(err.Error(), cfg.TLS.CertFile) {
		t.Fatalf("without files: %v", err)
	}
	first := writeCertificate(t, cfg.TLS.CertFile, cfg.TLS.KeyFile)
	a, _ := start(t, cfg)
	if !strings.HasPrefix(a.URL(), "https://127.0.0.1:") {
		t.Fatalf("it is at %s", a.URL())
	}
	trusting := func(cert *x509.Certificate) *http.Client {
		pool := x509.NewCertPool()
		pool.AddCert(cert)
		return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true, ForceAttemptHTTP2: true}}
	}
	if status, body := get(t, trusting(first), a.URL()+"/v1/models", ""); status != 200 || !strings.Contains(body, "small") {
		t.Errorf("over TLS: %d %s", status, body)
	}
	if status, _ := get(t, http.DefaultClient, strings.Replace(a.URL(), "https", "http", 1)+"/v1/models", ""); status != http.StatusBadRequest {
		t.Errorf("without TLS: %d", status)
	}
	old := tls.Config{MaxVersion: tls.VersionTLS11, InsecureSkipVerify: true} //nolint:gosec // that it is refused is what is tested
	if conn, err := (&tls.Dialer{Config: &old}).DialContext(t.Context(), "tcp", a.Addr()); err == nil {
		conn.Close()
		t.Error("TLS 1.1 was taken")
	}
	// Streams go through.
	config := openai.DefaultConfig("")
	config.BaseURL, config.HTTPClient = a.URL()+"/v1", trusting(first)
	if text, err := chat(t, openai.NewClientWithConfig(config), "small", "hello there"); err != nil || text != "hello there " {
		t.Errorf("chat: %q, %v", text, err)
	}
	// A broken pair changes nothing; a new one is used.
	if err := os.WriteFile(cfg.TLS.CertFile, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(recheckCertificate)
	if status, _ := get(t, trusting(first), a.URL()+"/health", ""); status != 200 {
		t.Errorf("with a broken file: %d", status)
	}
	second := writeCertificate(t, cfg.TLS.CertFile, cfg.TLS.KeyFile)
	time.Sleep(recheckCertificate)
	if status, _ := get(t, trusting(second), a.URL()+"/health", ""); status != 200 {
		t.Errorf("with the new certificate: %d", status)
	}
}

// TestHeaderLimits holds connections open without finishing a header, and sends one that is too long.
func TestHeaderLimits(t *testing.T) {
	cfg := config(t)
	cfg.Limits.HeaderTimeout = 300 * time.Millisecond
	a, _ := start(t, cfg)
	var slow []net.Conn
	for range 200 {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", a.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprint(conn, "GET /health HTTP/1.1\r\nHost: local")
		slow = append(slow, conn)
	}
	if status, _ := get(t, http.DefaultClient, a.URL()+"/health", ""); status != 200 {
		t.Errorf("beside slow headers: %d", status)
	}
	for _, conn := range slow {
		if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(conn); err != nil {
			t.Fatalf("the connection is still open: %v", err)
		}
	}
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", a.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n", strings.Repeat("x", 2*maxHeaderBytes))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a long header: %s", resp.Status)
	}
}

// TestDeafClient does not read what it asked for, and loses its connection.
func TestDeafClient(t *testing.T) {
	client, server := net.Pipe()
	defer client.Close()
	conn := patientConn{server, 50 * time.Millisecond}
	if _, err := conn.Write([]byte("unread")); err == nil {
		t.Error("a write to a client that does not read did not end")
	}
}
