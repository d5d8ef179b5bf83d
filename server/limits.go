package server

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/wire"
)

// bodyKind says how long the body of a route may be.
type bodyKind int

const (
	noBody   bodyKind = iota // some clients send {} all the same
	jsonBody                 // Options.MaxBodyBytes
	formBody                 // the handler's own limit, as it knows what it is for
)

const (
	// maxBodyBytes is Options.MaxBodyBytes where it is 0.
	maxBodyBytes = 32 << 20
	// maxUnusedBytes is for bodies that nobody reads.
	maxUnusedBytes = 64 << 10
	// bodyTimeout is Options.BodyTimeout where it is 0, and minBodyRate what a slower body must keep up, in bytes a second.
	bodyTimeout = 30 * time.Second
	minBodyRate = 4 << 10
	// unreadTimeout is for what is left of a body that was answered before its end.
	unreadTimeout = 2 * time.Second
)

// limitBody refuses a body that says that it is too long, and bounds the length of one that does not.
func (s *Server) limitBody(c *gin.Context, kind bodyKind) error {
	r := c.Request
	if r.Body == nil || r.Body == http.NoBody {
		return nil
	}
	limit := int64(maxUnusedBytes)
	switch kind {
	case noBody:
	case jsonBody:
		limit = s.maxBody
	case formBody:
		limit = 0
	}
	if limit > 0 && r.ContentLength > limit {
		c.Header("Connection", "close") // rather than reading what is not wanted
		return bodyTooLong(limit)
	}
	if limit > 0 {
		r.Body = http.MaxBytesReader(c.Writer, r.Body, limit)
	}
	return nil
}

func bodyTooLong(limit int64) error {
	return &wire.Error{Status: http.StatusRequestEntityTooLarge, Type: wire.ErrorTypeInvalidRequest, Code: new("request_too_large"),
		Message: fmt.Sprintf("the body is longer than %s", humanize.IBytes(uint64(limit)))} //nolint:gosec // not negative
}

// timedBody ends the reading of a body that comes too slowly: a client that sends a byte now and then would otherwise hold
// on to a connection for ever.
type timedBody struct {
	io.ReadCloser

	control *http.ResponseController
	began   time.Time
	grace   time.Duration
	read    int64
	ended   bool
}

// timeBody bounds the time of a request's body. The caller calls done when the request is answered.
func (s *Server) timeBody(c *gin.Context) (done func()) {
	whole := c.Request.Body
	if whole == nil || whole == http.NoBody {
		return func() {}
	}
	timed := &timedBody{ReadCloser: whole, control: http.NewResponseController(c.Writer), began: time.Now(), grace: s.bodyTimeout}
	c.Request.Body = timed
	return func() {
		// net/http reads what is left of a body, if that is not much, before it sends the answer. It must know its own body for
		// that, and would wait for a client that sends nothing more.
		c.Request.Body = whole
		if !timed.ended {
			_ = timed.control.SetReadDeadline(time.Now().Add(min(s.bodyTimeout, unreadTimeout))) // as in Read
		}
	}
}

func (b *timedBody) Read(p []byte) (int, error) {
	allowed := b.grace + time.Duration(b.read)*(time.Second/minBodyRate)
	_ = b.control.SetReadDeadline(b.began.Add(allowed)) // a connection without deadlines is a test's
	n, err := b.ReadCloser.Read(p)
	b.read += int64(n)
	if errors.Is(err, io.EOF) { // after another error net/http reads what is left, which must not take for ever
		b.ended = true
		// What follows on this connection has its own times. While the request is answered, net/http reads on to see the client
		// go, and would take a deadline for that.
		_ = b.control.SetReadDeadline(time.Time{})
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = &wire.Error{Status: http.StatusRequestTimeout, Type: wire.ErrorTypeInvalidRequest, Code: new("request_timeout"),
			Message: fmt.Sprintf("the body came too slowly: %s in %s", humanize.IBytes(uint64(b.read)), time.Since(b.began).Round(time.Second))} //nolint:gosec // not negative
	}
	return n, err
}
