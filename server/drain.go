package server

import (
	"sync"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
)

// drain counts requests in progress, until the server stops and takes no more. The zero value takes requests.
type drain struct {
	mu         sync.Mutex
	inProgress int
	idle       chan struct{} // nil: requests are taken; closed when none is left
}

// enter reports whether a request is taken; leave follows it.
func (d *drain) enter() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.idle != nil {
		return false
	}
	d.inProgress++
	return true
}

func (d *drain) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.inProgress--
	if d.idle != nil && d.inProgress == 0 {
		close(d.idle)
	}
}

func (d *drain) begin() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.idle == nil {
		d.idle = make(chan struct{})
		if d.inProgress == 0 {
			close(d.idle)
		}
	}
	return d.idle
}

func (d *drain) begun() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.idle != nil
}

// Drain refuses requests from now on with a 503 and Retry-After, and returns a channel that is closed when those in progress
// are answered. Looking at the server itself (/health, /ready, /metrics) stays possible, and /ready says that it is draining.
func (s *Server) Drain() <-chan struct{} { return s.drain.begin() }

// admit lets a request in, unless the server drains.
func (s *Server) admit(c *gin.Context) {
	switch c.FullPath() {
	case "/health", "/ready", "/metrics", "/debug/pprof/*name":
		return
	}
	if !s.drain.enter() {
		s.handle(refuseDraining)(c)
		return
	}
	defer s.drain.leave()
	c.Next()
}

func refuseDraining(c *gin.Context) error {
	c.Header("Connection", "close") // it is no use to the client any more
	return child.ErrStopping
}
