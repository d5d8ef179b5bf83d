package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"iter"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
)

// stream sends completions as server-sent events: what chunks makes of each event, then [DONE]. Nothing is sent before
// the first event is there, so a refusal still has its HTTP status. A later error is returned after events were sent;
// Server.handle then writes it as the stream's last event.
//
// No comments are sent to keep the connection alive: go-openai takes them for a part of an error that follows.
func stream(c *gin.Context, events iter.Seq2[child.GenerateEvent, error], chunks func(event child.GenerateEvent) []any) error {
	started := false
	for event, err := range events {
		if err != nil {
			return err
		}
		if !started {
			started = true
			header := c.Writer.Header()
			header.Set("Content-Type", "text/event-stream")
			header.Set("Cache-Control", "no-cache")
			header.Set("X-Accel-Buffering", "no") // nginx would hold events back
		}
		for _, chunk := range chunks(event) {
			writeEvent(c, chunk)
		}
		if event.Usage != nil {
			_, _ = c.Writer.WriteString("data: [DONE]\n\n") // a client that is gone cannot be told
			c.Writer.Flush()
			return nil
		}
	}
	return child.ErrEnded
}

// writeEvent writes and flushes one event. go-openai recognises an error only if nothing precedes its "error" key.
func writeEvent(c *gin.Context, v any) {
	var line bytes.Buffer
	line.WriteString("data: ")
	enc := json.NewEncoder(&line)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(fmt.Sprintf("encode an event: %v", err)) // types of ours, without floats that JSON lacks
	}
	line.WriteByte('\n')
	_, _ = c.Writer.Write(line.Bytes()) // a client that is gone cannot be told; its context cancels the completion
	c.Writer.Flush()
}
