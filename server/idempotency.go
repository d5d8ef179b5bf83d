package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"net/http"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

// The header that names a request that may be sent again, the one that tells an answer to such a repetition, as Stripe calls it,
// and the longest name.
const (
	idempotencyHeader      = "Idempotency-Key"
	replayedHeader         = "Idempotent-Replayed"
	maxIdempotencyKeyBytes = 255
)

// idempotencyField is where gin's context keeps the request's *repeatable.
const idempotencyField = "idempotency"

// repeatable is what is known of a request with an Idempotency-Key.
type repeatable struct {
	key     string    // digest of who sent it and of the header
	request hash.Hash // of what it asks for
}

// idempotent takes the header Idempotency-Key, and keeps a request with one out while another with the same key is answered: the handler
// calls once when it has read the request, and digest is told of all that it has read.
func (s *Server) idempotent(c *gin.Context) error {
	values := c.Request.Header.Values(idempotencyHeader)
	if len(values) == 0 {
		return nil
	}
	value := strings.Join(values, ",")
	if value == "" || len(value) > maxIdempotencyKeyBytes || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) {
		return invalid("", "the header %s has %d bytes, expected 1 to %d printable ASCII characters, such as a random UUID", idempotencyHeader, len(value), maxIdempotencyKeyBytes)
	}
	sender, _ := bearer(c.Request)
	again := &repeatable{key: hex.EncodeToString(digestOf(sender, value).Sum(nil)), request: digestOf(c.Request.Method, c.Request.URL.Path)}
	if _, busy := s.repeatables.LoadOrStore(again.key, true); busy {
		e := &wire.Error{Status: http.StatusConflict, Type: wire.ErrorTypeInvalidRequest, Code: new("idempotency_key_in_use"), RetryAfter: overloadedRetry,
			Message: fmt.Sprintf("a request with the same %s is not answered yet; send this one again when it is", idempotencyHeader)}
		return e
	}
	defer s.repeatables.Delete(again.key)
	c.Set(idempotencyField, again)
	c.Next()
	return nil
}

// digestOf hashes texts and where each of them ends.
func digestOf(texts ...string) hash.Hash {
	h := sha256.New()
	addTo(h, texts...)
	return h
}

func addTo(h hash.Hash, texts ...string) {
	for _, text := range texts {
		fmt.Fprintf(h, "%d:%s", len(text), text)
	}
}

func repeatableIn(c *gin.Context) *repeatable {
	again, _ := c.Value(idempotencyField).(*repeatable)
	return again
}

// digest adds to what a request with an Idempotency-Key asks for.
func digest(c *gin.Context, texts ...string) {
	if again := repeatableIn(c); again != nil {
		addTo(again.request, texts...)
	}
}

// once answers a request that came before, with its Idempotency-Key, by showing what it made then: done, or an error. Otherwise the object
// is to be made with the context.
func (s *Server) once(c *gin.Context, show func(c *gin.Context, id string) error) (ctx context.Context, done bool, err error) {
	again := repeatableIn(c)
	if again == nil {
		return c.Request.Context(), false, nil
	}
	request := store.Idempotency{Key: again.key, Request: hex.EncodeToString(again.request.Sum(nil))}
	id, err := s.files.MadeBy(c.Request.Context(), request)
	if err != nil || id == "" {
		return store.WithIdempotency(c.Request.Context(), request), false, err
	}
	c.Header(replayedHeader, "true")
	err = show(c, id)
	if missing := new(wire.Error); errors.As(err, &missing) && missing.Status == http.StatusNotFound || errors.Is(err, store.ErrNotFound) {
		err = &wire.Error{Status: http.StatusNotFound, Type: wire.ErrorTypeInvalidRequest, Code: new("not_found"),
			Message: fmt.Sprintf("the request with this %s has made %s, which is not there any more; a new one needs a new key", idempotencyHeader, id)}
	}
	return nil, true, err
}
