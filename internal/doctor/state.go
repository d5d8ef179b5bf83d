package doctor

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize/english"
	"golang.org/x/sys/unix"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/store"
)

// holder is the process that has the data directory open.
type holder struct {
	held bool
	pid  int // 0: not known
}

func (h holder) String() string {
	if h.pid == 0 {
		return "another hone process"
	}
	return fmt.Sprintf("hone process %d", h.pid)
}

// dataDirectory says whether state can be written, and who does.
func (o *Options) dataDirectory() (Check, holder) {
	bad := func(err error, fix string) (Check, holder) {
		return Check{"data directory", Problem, oneLine(err), fix}, holder{}
	}
	const other = "give this user the right to write there, or name another directory with HONE_HOME or --data-dir"
	_, err := os.Stat(o.DataDir)
	if errors.Is(err, fs.ErrNotExist) {
		parent := existing(o.DataDir)
		if err := unix.Access(parent, unix.W_OK|unix.X_OK); err != nil {
			return bad(fmt.Errorf("%s is not there and cannot be made in %s: %w", o.DataDir, parent, err), other)
		}
		return Check{"data directory", OK, o.DataDir + " is made by the first start", ""}, holder{}
	}
	if err != nil {
		return bad(err, other)
	}
	// access(2) knows nothing of full or broken disks.
	f, err := os.CreateTemp(o.DataDir, ".doctor-*")
	if err == nil {
		_, err = f.WriteString("hone doctor\n")
		err = errors.Join(err, f.Sync(), f.Close(), os.Remove(f.Name()))
	}
	switch {
	case durable.DiskFull(err):
		return bad(err, "free space there, or name another directory with HONE_HOME or --data-dir")
	case err != nil:
		return bad(err, other)
	}
	pid, held, err := store.Holder(o.DataDir)
	if err != nil {
		return bad(fmt.Errorf("%s cannot be locked: %w", o.DataDir, err), "take a directory on a local disk: some network file systems have no locks")
	}
	h := holder{held, pid}
	if held {
		return Check{"data directory", OK, fmt.Sprintf("%s, in use by %s", o.DataDir, h), ""}, h
	}
	return Check{"data directory", OK, o.DataDir + ", writable", ""}, h
}

// existing is the directory itself, or the next above it that is there.
func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// Free disk space below which the next jobs may fail, and below which anything may.
const (
	jobDisk = 2 << 30
	anyDisk = 256 << 20
)

func (o *Options) disk() Check {
	dir := existing(o.DataDir)
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return Check{"disk", Warning, fmt.Sprintf("free space of %s is not known: %v", dir, err), "name another directory with HONE_HOME or --data-dir"}
	}
	return diskCheck(dir, int64(s.Bavail)*s.Bsize, int64(s.Blocks)*s.Bsize)
}

func diskCheck(dir string, free, total int64) Check {
	check := Check{"disk", OK, fmt.Sprintf("%s free of %s at %s", size(free), size(total), dir), ""}
	switch {
	case free < anyDisk:
		check.Status = Problem
	case free < jobDisk:
		check.Status = Warning
	}
	if check.Status != OK {
		check.Fix = "free space: hone models rm MODEL, old files and jobs over the API; or name another directory with HONE_HOME. " +
			"A job keeps two resume states and its checkpoints there, and models lie there"
	}
	return check
}

// server says whether the configured address is free, or who answers there.
func (o *Options) server(ctx context.Context, h holder) Check {
	address := net.JoinHostPort(o.Host, strconv.Itoa(o.Port))
	if o.Port == 0 {
		if h.held {
			return Check{"server", OK, fmt.Sprintf("%s runs; where it listens is not configured (port 0)", h), ""}
		}
		return Check{"server", OK, "not running; it takes a free port (port 0)", ""}
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err == nil {
		listener.Close()
		if h.held {
			return Check{"server", Warning, fmt.Sprintf("%s has the data directory, and nobody listens on %s", h, address),
				"it was started with another port (its first line says which: use HONE_BASE_URL or --base-url), or it is starting or stopping"}
		}
		return Check{"server", OK, fmt.Sprintf("not running; port %d of %s is free", o.Port, o.Host), ""}
	}
	switch {
	case errors.Is(err, syscall.EACCES):
		return Check{"server", Problem, fmt.Sprintf("may not listen on %s: %v", address, syscall.EACCES), "ports below 1024 need a privilege: set port to a higher one"}
	case !errors.Is(err, syscall.EADDRINUSE):
		return Check{"server", Problem, fmt.Sprintf("cannot listen on %s: %s", address, oneLine(err)), "set host to an address of this machine, such as 127.0.0.1"}
	}
	scheme := "http://"
	if o.CertFile != "" {
		scheme = "https://"
	}
	url := scheme + address
	if ip := net.ParseIP(o.Host); ip != nil && ip.IsUnspecified() {
		url = scheme + net.JoinHostPort("127.0.0.1", strconv.Itoa(o.Port))
	}
	models, healthErr := o.health(ctx, url)
	switch {
	case !h.held && healthErr == nil:
		return Check{"server", Problem, fmt.Sprintf("port %d is in use by a hone server over another data directory", o.Port), "set port (--port, HONE_PORT) to another, or stop that server"}
	case !h.held:
		return Check{"server", Problem, fmt.Sprintf("port %d is in use by another program", o.Port),
			fmt.Sprintf("set port (--port, HONE_PORT) to another, or end that program: ss -ltnp 'sport = :%d' names it", o.Port)}
	case healthErr != nil:
		return Check{"server", Problem, fmt.Sprintf("%s has the data directory, but %s/health does not answer as it should: %s", h, url, oneLine(healthErr)),
			"look at its log; if it hangs, stop it (SIGTERM keeps the running job's state) and start it again"}
	}
	if exe, err := os.Readlink(o.path(fmt.Sprintf("proc/%d/exe", h.pid))); err == nil && strings.HasSuffix(exe, " (deleted)") {
		return Check{"server", Warning, fmt.Sprintf("healthy at %s, but %s runs a program that has been replaced since", url, h), "start it again; the running job goes on"}
	}
	found, failing := describeModels(models)
	if failing {
		return Check{"server", Warning, fmt.Sprintf("healthy at %s (%s), but %s", url, h, found), "its log has what the model's process said; for one that waits, memory: in the configuration is the budget of all models and jobs"}
	}
	return Check{"server", OK, fmt.Sprintf("healthy at %s (%s); %s", url, h, found), ""}
}

// describeModels says which models a server has in memory, and whether one waits for memory or does not start.
func describeModels(models []child.ModelState) (text string, failing bool) {
	if models == nil {
		return "it tells its models to those who have a key: set HONE_API_KEY", false
	}
	var parts []string
	for _, m := range models {
		part := fmt.Sprintf("%s is %s", m.Model, m.State)
		switch {
		case m.State == child.Failed || m.State == child.Waiting:
			failing = true
			part += " (" + oneLine(errors.New(m.Error)) + ")"
		case m.State == child.Loading && m.TotalBytes > 0:
			part += fmt.Sprintf(" (%s of %s)", size(m.LoadedBytes), size(m.TotalBytes))
		case m.IdleSeconds > 0:
			part += fmt.Sprintf(" (%s, idle for %s)", size(m.MemoryBytes), time.Duration(m.IdleSeconds*float64(time.Second)).Round(time.Second))
		default:
			part += fmt.Sprintf(" (%s, %s)", size(m.MemoryBytes), english.Plural(m.Requests, "request", ""))
		}
		parts = append(parts, part)
	}
	if parts == nil {
		return "no model is in memory", false
	}
	return strings.Join(parts, "; "), failing
}

// health asks a hone server how it is, and its models: nil if it does not tell them without a key.
func (o *Options) health(ctx context.Context, url string) ([]child.ModelState, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/health", nil)
	if err != nil {
		return nil, err
	}
	if o.Key != "" {
		req.Header.Set("Authorization", "Bearer "+o.Key)
	}
	// Of this machine: never through a proxy.
	transport := &http.Transport{DisableKeepAlives: true}
	if o.CertFile != "" {
		if transport.TLSClientConfig, err = o.trust(); err != nil {
			return nil, err
		}
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var body struct {
		Status string             `json:"status"`
		Models []child.ModelState `json:"models"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<16)).Decode(&body); err != nil || resp.StatusCode != http.StatusOK || body.Status != "ok" {
		return nil, fmt.Errorf("it answers %s", resp.Status)
	}
	return body.Models, nil
}

// trust takes the configured certificate itself, which need not be of the address that this machine reaches the server at,
// nor signed by anybody.
func (o *Options) trust() (*tls.Config, error) {
	text, err := os.ReadFile(o.CertFile)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s has no certificate in PEM", o.CertFile)
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, // #nosec G402 -- VerifyConnection compares the certificate as a whole
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 || !bytes.Equal(state.PeerCertificates[0].Raw, block.Bytes) {
				return errors.New("its certificate is not that of tls.cert_file")
			}
			return nil
		},
	}, nil
}
