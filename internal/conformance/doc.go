// Package conformance holds a running server to OpenAPI documents: OpenAI's published one (testdata/openai.json) and the
// server's own (GET /openapi.json). It has tests only; they validate every answer, streams event by event, and errors.
package conformance
