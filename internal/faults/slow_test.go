//go:build faults

package faults

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestSlowClients keeps thousands of connections that do next to nothing, and asks beside them.
func TestSlowClients(t *testing.T) {
	p := prove(t, "R10", "2000 half-sent headers, 100 bodies of 1 B/s, 20 readers that never read", "requests beside them go on; headers and bodies that do not come are ended in their time, unread answers after write_timeout")
	s := start(t, newHome(t), "HONE_LIMITS_HEADER_TIMEOUT=4s", "HONE_LIMITS_BODY_TIMEOUT=4s", "HONE_LIMITS_WRITE_TIMEOUT=4s", "HONE_LOG_LEVEL=error")
	address := strings.TrimPrefix(s.url, "http://")
	file := s.upload(t, "large.jsonl", strings.Repeat(rows(1), 100_000))
	measure := func() (worst time.Duration) { // the 99th of 100 requests, every tenth of which is computed
		var all []time.Duration
		for i := range 100 {
			began := time.Now()
			if i%10 == 0 {
				if _, _, err := s.chat(t.Context(), tiny, "a", 4); err != nil {
					t.Errorf("a chat beside slow clients: %v", err)
				}
			} else {
				s.must(t, http.MethodGet, "/v1/models", nil, nil)
			}
			all = append(all, time.Since(began))
		}
		slices.Sort(all)
		return all[98]
	}
	measure() // the first loads the model
	alone := measure()
	descriptors := func() int {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(open)
	}
	before := descriptors()
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	open := func(text string) net.Conn {
		conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(t.Context(), "tcp", address)
		if err != nil {
			t.Fatalf("after %d connections: %v", len(conns), err)
		}
		conns = append(conns, conn)
		_, _ = io.WriteString(conn, text)
		return conn
	}
	began := time.Now()
	for range 2000 {
		open("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Half: ")
	}
	var slow []net.Conn
	for range 100 {
		slow = append(slow, open("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{"))
	}
	var readers []net.Conn
	for i := range 20 {
		conn := open("")
		_ = conn.(*net.TCPConn).SetReadBuffer(4096)
		readers = append(readers, conn)
		if i%2 == 0 {
			fmt.Fprintf(conn, "GET /v1/files/%s/content HTTP/1.1\r\nHost: localhost\r\n\r\n", file)
			continue
		}
		body := `{"model":"tiny","stream":true,"n":8,"max_tokens":100,"messages":[{"role":"user","content":"a"}]}`
		fmt.Fprintf(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	stop := make(chan struct{})
	var feeding sync.WaitGroup
	feeding.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
				for _, conn := range slow {
					_, _ = conn.Write([]byte(" "))
				}
			}
		}
	})
	beside := measure()
	p.inject(len(conns))
	if beside > alone+2*time.Second {
		t.Errorf("the slowest of a hundred requests took %v beside slow clients, %v alone", beside, alone)
	}
	// All of the halves are ended, in 4 s and what a busy machine adds.
	ended := func(conns []net.Conn, limit time.Duration) (n int) {
		deadline := time.Now().Add(limit)
		for _, conn := range conns {
			_ = conn.SetReadDeadline(deadline)
			if _, err := io.Copy(io.Discard, conn); err == nil || !os.IsTimeout(err) {
				n++
			}
		}
		return n
	}
	if n := ended(conns[:2000], 40*time.Second); n != 2000 {
		t.Errorf("%d of 2000 half headers were ended", n)
	}
	headers := time.Since(began)
	if n := ended(slow, 40*time.Second); n != len(slow) {
		t.Errorf("%d of %d slow bodies were ended", n, len(slow))
	}
	close(stop)
	feeding.Wait()
	// The unread downloads are cut: the server gives their connections up. Those of the streams may wait for a next request.
	cut := func() bool { return descriptors() <= before+len(readers)/2+2 }
	for deadline := time.Now().Add(30 * time.Second); !cut(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the server has %d files open, it had %d before: unread downloads are not cut", descriptors(), before)
		}
	}
	if _, _, err := s.chat(t.Context(), tiny, "a", 4); err != nil {
		t.Error(err)
	}
	p.found("the slowest of 100 requests (p99) took %v beside them and %v alone; every half header was gone %v after the first, every slow body ended, %d unread downloads cut",
		beside.Round(time.Millisecond), alone.Round(time.Millisecond), headers.Round(time.Second), len(readers)/2)
}
