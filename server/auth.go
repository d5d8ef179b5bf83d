package server

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/wire"
)

// Key lets whoever presents it use the routes of its scopes.
type Key struct {
	Name   string // for the log
	Hash   [sha256.Size]byte
	Scopes []string // ScopeInfer, ...; no scope holds another
}

// Scopes of keys.
const (
	ScopeInfer = "infer" // computing with models, and seeing which there are
	ScopeTrain = "train" // files, batches, fine-tuning jobs, and deleting what they made
	ScopeAdmin = "admin" // numbers and profiles of the server itself
)

// access is what a route takes: the scopes that its key needs, all of them, and the body.
type access struct {
	scopes []string // nil: no key
	body   bodyKind
}

var (
	open  = access{}
	infer = access{[]string{ScopeInfer}, noBody}
	train = access{[]string{ScopeTrain}, noBody}
	admin = access{[]string{ScopeAdmin}, noBody}
)

func (a access) with(body bodyKind) access { return access{a.scopes, body} }

// routes says who may use each route. One that is not here needs admin: a test finds it.
var routes = map[string]access{
	"GET /health":       open, // without a key it says nothing but that the server is there
	"GET /ready":        open,
	"GET /openapi.json": open,

	"GET /metrics":           admin,
	"GET /debug/pprof/*name": admin,

	"POST /v1/chat/completions": infer.with(jsonBody),
	"POST /v1/completions":      infer.with(jsonBody),
	"POST /v1/embeddings":       infer.with(jsonBody),
	"POST /v1/decisions":        infer.with(jsonBody),
	"POST /v1/tokenize":         infer.with(jsonBody),
	"POST /v1/detokenize":       infer.with(jsonBody),
	"GET /v1/tokenizer_info":    infer,
	"POST /tokenize":            infer.with(jsonBody),
	"POST /detokenize":          infer.with(jsonBody),
	"GET /tokenizer_info":       infer,
	"GET /v1/models":            infer,
	"GET /v1/models/*id":        infer,
	"DELETE /v1/models/*id":     train,

	"POST /v1/files":            train.with(formBody),
	"GET /v1/files":             train,
	"GET /v1/files/:id":         train,
	"GET /v1/files/:id/content": train,
	"DELETE /v1/files/:id":      train,

	"POST /v1/uploads":              train.with(jsonBody),
	"POST /v1/uploads/:id/parts":    train.with(formBody),
	"POST /v1/uploads/:id/complete": train.with(jsonBody),
	"POST /v1/uploads/:id/cancel":   train,

	"POST /v1/batches":            {[]string{ScopeTrain, ScopeInfer}, jsonBody}, // of files, with models
	"GET /v1/batches":             train,
	"GET /v1/batches/:id":         train,
	"POST /v1/batches/:id/cancel": train,

	"POST /v1/fine_tuning/jobs":                train.with(jsonBody),
	"POST /v1/fine_tuning/jobs/dry_run":        train.with(jsonBody),
	"GET /v1/fine_tuning/jobs":                 train,
	"GET /v1/fine_tuning/jobs/:id":             train,
	"POST /v1/fine_tuning/jobs/:id/cancel":     train,
	"POST /v1/fine_tuning/jobs/:id/pause":      train,
	"POST /v1/fine_tuning/jobs/:id/resume":     train,
	"GET /v1/fine_tuning/jobs/:id/events":      train,
	"GET /v1/fine_tuning/jobs/:id/checkpoints": train,

	"GET /v1/fine_tuning/checkpoints/:checkpoint/permissions":                train,
	"POST /v1/fine_tuning/checkpoints/:checkpoint/permissions":               train.with(jsonBody),
	"DELETE /v1/fine_tuning/checkpoints/:checkpoint/permissions/:permission": train,
}

// accessOf is that of the request's route; of a request that no route takes, any key will do to be told so.
func accessOf(c *gin.Context) access {
	if c.FullPath() == "" {
		return access{scopes: []string{}}
	}
	if a, ok := routes[c.Request.Method+" "+c.FullPath()]; ok {
		return a
	}
	return admin
}

// guard refuses what a browser sends for a foreign page, who has no key for the route, and bodies that are too long.
//
// A page of any site can make a browser send requests to this machine. Writes from another origin are told by their
// Origin and Sec-Fetch-Site headers. A page whose own name was pointed at 127.0.0.1 after it was loaded (DNS
// rebinding) is of the same origin for the browser, and only its Host header tells it.
func (s *Server) guard(c *gin.Context) error {
	need := accessOf(c)
	if !s.hostAllowed(c.Request.Host) {
		return &wire.Error{Status: http.StatusForbidden, Type: wire.ErrorTypeInvalidRequest, Code: new("host_not_allowed"),
			Message: fmt.Sprintf("requests to the host name %q are refused; use 127.0.0.1, or add the name to allowed_hosts in the configuration", c.Request.Host)}
	}
	if s.crossOrigin(c) {
		return nil
	}
	err := s.origin.Check(c.Request)
	if err == nil && slices.Contains(need.scopes, ScopeAdmin) {
		// Reading these costs something, so pages may not even make a browser do it.
		if site := c.GetHeader("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
			err = http.ErrNotSupported
		}
	}
	if err != nil {
		return &wire.Error{Status: http.StatusForbidden, Type: wire.ErrorTypeInvalidRequest, Code: new("origin_not_allowed"),
			Message: "requests from web pages of another origin are refused; add the page's origin to cors_origins in the configuration if it is yours"}
	}
	if err := s.authorize(c, need.scopes); err != nil {
		return err
	}
	return s.limitBody(c, need.body)
}

// hostAllowed reports whether a Host header may be served. Addresses are: rebinding needs a name.
func (s *Server) hostAllowed(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.ToLower(strings.TrimSuffix(strings.Trim(name, "[]"), "."))
	if _, err := netip.ParseAddr(name); err == nil {
		return true
	}
	return s.anyHost || name == "localhost" || strings.HasSuffix(name, ".localhost") ||
		slices.ContainsFunc(s.hosts, func(allowed string) bool { return strings.EqualFold(allowed, name) })
}

// maxCORSHeaders bounds what a preflight may ask for; it is repeated in the answer.
const maxCORSHeaders = 1024

// crossOrigin lets pages of the configured origins read answers. It reports whether the request was a preflight, which a
// browser sends without a key, and is answered.
func (s *Server) crossOrigin(c *gin.Context) (answered bool) {
	if len(s.corsOrigins) == 0 {
		return false
	}
	header := c.Writer.Header()
	header.Add("Vary", "Origin")
	origin := c.GetHeader("Origin")
	if !slices.Contains(s.corsOrigins, origin) {
		return false
	}
	header.Set("Access-Control-Allow-Origin", origin)
	header.Set("Access-Control-Expose-Headers", "X-Request-Id, Retry-After, "+replayedHeader)
	if c.Request.Method != http.MethodOptions || c.GetHeader("Access-Control-Request-Method") == "" {
		return false
	}
	header.Set("Access-Control-Allow-Methods", "GET, POST, DELETE")
	asked := c.GetHeader("Access-Control-Request-Headers")
	if len(asked) <= maxCORSHeaders && !strings.ContainsFunc(asked, func(r rune) bool { return r < ' ' || r > '~' }) {
		header.Set("Access-Control-Allow-Headers", asked) // OpenAI's library for Node has a dozen of its own
	}
	header.Set("Access-Control-Max-Age", "600")
	c.AbortWithStatus(http.StatusNoContent)
	return true
}

// keyField is where gin's context keeps the request's *Key.
const keyField = "key"

// authorize checks the request's key. It also notes whose a request to an open route is.
func (s *Server) authorize(c *gin.Context, scopes []string) error {
	if len(s.keys) == 0 {
		return nil
	}
	presented, sent := bearer(c.Request)
	key := s.keyOf(presented)
	if key != nil {
		c.Set(keyField, key)
	}
	switch {
	case scopes == nil:
		return nil
	case key == nil:
		c.Header("WWW-Authenticate", `Bearer realm="hone"`)
		message := "the API key is not one of this server's"
		if !sent {
			message = "this server needs an API key: send the header Authorization: Bearer KEY (hone's own commands take it from HONE_API_KEY)"
		}
		return &wire.Error{Status: http.StatusUnauthorized, Type: wire.ErrorTypeInvalidRequest, Code: new("invalid_api_key"), Message: message}
	}
	for _, scope := range scopes {
		if !slices.Contains(key.Scopes, scope) {
			return &wire.Error{Status: http.StatusForbidden, Type: wire.ErrorTypeInvalidRequest, Code: new("insufficient_scope"),
				Message: fmt.Sprintf("the API key %s does not have the scope %s, which %s %s needs; it has %s",
					key.Name, scope, c.Request.Method, c.FullPath(), strings.Join(key.Scopes, ", "))}
		}
	}
	return nil
}

// bearer is the key that a request presents, and whether it presents anything.
func bearer(r *http.Request) (key string, sent bool) {
	header := r.Header.Get("Authorization")
	scheme, key, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return "", header != ""
	}
	return strings.TrimSpace(key), true
}

// keyOf returns the key that was presented, or nil. It looks at all of them for as long, whichever it is.
func (s *Server) keyOf(presented string) *Key {
	hash := sha256.Sum256([]byte(presented))
	found := -1
	for i := range s.keys {
		same := subtle.ConstantTimeCompare(hash[:], s.keys[i].Hash[:])
		found = subtle.ConstantTimeSelect(same, i, found)
	}
	if found < 0 || presented == "" {
		return nil
	}
	return &s.keys[found]
}

// keyIn is the request's key; nil where none is needed, or it has none.
func keyIn(c *gin.Context) *Key {
	key, _ := c.Value(keyField).(*Key)
	return key
}

// trusted reports whether the request may be told about what the server does: it has a key, or none is needed.
func (s *Server) trusted(c *gin.Context) bool { return len(s.keys) == 0 || keyIn(c) != nil }
