package app

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// recheckCertificate is how often, at most, a handshake looks whether the certificate was replaced.
const recheckCertificate = time.Second

// certificate is a TLS certificate in files, which are read again when they were replaced.
type certificate struct {
	certFile, keyFile string
	logger            *slog.Logger

	mu      sync.Mutex
	loaded  *tls.Certificate
	version [2]fileVersion // of what is loaded, or could not be
	checked time.Time
}

// fileVersion changes when a file is written or replaced.
type fileVersion struct {
	modified time.Time
	size     int64
	err      string
}

func versionOf(path string) fileVersion {
	info, err := os.Stat(path)
	if err != nil {
		return fileVersion{err: err.Error()}
	}
	return fileVersion{modified: info.ModTime(), size: info.Size()}
}

// loadCertificate reads both files. The error names them and what to do.
func loadCertificate(certFile, keyFile string, logger *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, logger: logger}
	c.version = c.versions()
	loaded, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("tls.cert_file %s and tls.key_file %s: %w; expected a certificate and its key in PEM", certFile, keyFile, err)
	}
	c.loaded, c.checked = &loaded, time.Now()
	return c, nil
}

func (c *certificate) versions() [2]fileVersion {
	return [2]fileVersion{versionOf(c.certFile), versionOf(c.keyFile)}
}

// get is tls.Config's GetCertificate. While files do not fit together, as between the writing of one and of the other, the
// certificate before is used.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.checked) < recheckCertificate {
		return c.loaded, nil
	}
	c.checked = time.Now()
	if version := c.versions(); version != c.version {
		loaded, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
		c.version = version
		if err != nil {
			c.logger.Warn("the TLS certificate changed and cannot be used; the one before stays", "cert_file", c.certFile, "key_file", c.keyFile, "error", err)
			return c.loaded, nil
		}
		c.loaded = &loaded
		c.logger.Info("the TLS certificate was replaced", "cert_file", c.certFile)
	}
	return c.loaded, nil
}

// patientListener bounds how long a client may leave unread what it was sent. http.Server.WriteTimeout would end long streams.
type patientListener struct {
	net.Listener

	timeout time.Duration
}

func (l patientListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return patientConn{conn, l.timeout}, nil
}

type patientConn struct {
	net.Conn

	timeout time.Duration
}

func (c patientConn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.timeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}
