package client_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/client"
)

// Whatever a server streams, the answer ends with a reason or an error: a stream that broke off is never taken for a whole one.
func FuzzStream(f *testing.F) {
	const chunk = `data: {"id":"a","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"é"},"finish_reason":null}]}` + "\n\n"
	const last = `data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n\n"
	for _, stream := range []string{
		chunk + last + "data: [DONE]\n\n", chunk + chunk, chunk + "data: [DONE]\n\n", chunk + last, "", "data: ", "data: {}\n\ndata: [DONE]\n\n",
		": comment\n\nevent: x\nid: 1\nretry: 5\n" + last + "data: [DONE]\n\n", "data: {\"choices\":[{\"delta\":{\"content\":1}}]}\n\n",
		chunk + `data: {"error":{"message":"m","type":"server_error","param":null,"code":"c"}}` + "\n\n", chunk[:60], "data:{\"choices\":null}\r\n\r\ndata: [DONE]\r\n\r\n",
		"data: \xff\n\n", "data: null\n\n" + last, `{"error":{"message":"no stream"}}`,
	} {
		f.Add(stream)
	}
	var body string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = w.Write([]byte(body))
	}))
	f.Cleanup(server.Close)
	c := client.New(server.URL+"/v1", "")
	f.Fuzz(func(t *testing.T, stream string) {
		body = stream
		text := ""
		answer, reason, err := c.StreamChat(t.Context(), openai.ChatCompletionRequest{Model: "m"}, func(delta client.ChatDelta) error {
			text += delta.Text
			return nil
		})
		if (err == nil) != (reason != "") {
			t.Errorf("%q: reason %q, %v", stream, reason, err)
		}
		if answer != text {
			t.Errorf("%q: answer %q, its pieces %q", stream, answer, text)
		}
	})
}
