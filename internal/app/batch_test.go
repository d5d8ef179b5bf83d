package app

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	openai "github.com/sashabaranov/go-openai"
)

func awaitBatch(t *testing.T, client *openai.Client, id string, done func(openai.Batch) bool) openai.Batch {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		resp, err := client.RetrieveBatch(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if done(resp.Batch) {
			return resp.Batch
		}
		if time.Now().After(deadline) {
			t.Fatalf("the batch %+v does not get on", resp.Batch)
		}
	}
}

// outcomes reads a batch's files as clients do: the text of each answer, or its status, or the code of its error.
func outcomes(t *testing.T, client *openai.Client, b openai.Batch) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, id := range []*string{b.OutputFileID, b.ErrorFileID} {
		if id == nil {
			continue
		}
		content, err := client.GetFileContent(t.Context(), *id)
		if err != nil {
			t.Fatal(err)
		}
		defer content.Close()
		for lines := bufio.NewScanner(content); lines.Scan(); {
			var line struct {
				CustomID string `json:"custom_id"`
				Response *struct {
					StatusCode int                           `json:"status_code"`
					RequestID  string                        `json:"request_id"`
					Body       openai.ChatCompletionResponse `json:"body"`
				} `json:"response"`
				Error *openai.APIError `json:"error"`
			}
			if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
				t.Fatalf("%s: %v", lines.Bytes(), err)
			}
			if _, twice := all[line.CustomID]; twice {
				t.Errorf("%s is answered twice", line.CustomID)
			}
			switch {
			case line.Error != nil:
				all[line.CustomID] = fmt.Sprint(line.Error.Code)
			case line.Response.StatusCode == http.StatusOK:
				all[line.CustomID] = line.Response.Body.Choices[0].Message.Content
			default:
				all[line.CustomID] = fmt.Sprint(line.Response.StatusCode)
			}
			if line.Response != nil && !strings.HasPrefix(line.Response.RequestID, "req_") {
				t.Errorf("%s has no request id", lines.Bytes())
			}
		}
	}
	return all
}

// TestBatches creates batches through go-openai, stops the server in the middle of one, and lets another go on with it.
func TestBatches(t *testing.T) {
	cfg := config(t)
	a, client := start(t, cfg)
	var upload openai.UploadBatchFileRequest
	want := map[string]string{}
	ask := func(id, model, text string) {
		upload.AddChatCompletion(id, openai.ChatCompletionRequest{Model: model, Messages: []openai.ChatCompletionMessage{{Role: "user", Content: text}}})
	}
	for i := range 300 {
		id, text := fmt.Sprintf("request-%d", i), fmt.Sprintf("hello %d", i)
		ask(id, "small", text)
		want[id] = text + " "
	}
	ask("unknown", "none", "hello")
	ask("deadly", "small", "die")
	want["unknown"], want["deadly"] = "404", "500"
	created, err := client.CreateBatchWithUploadFile(t.Context(), openai.CreateBatchWithUploadFileRequest{
		Endpoint: openai.BatchEndpointChatCompletions, CompletionWindow: "24h", UploadBatchFileRequest: upload, Metadata: map[string]any{"k": "v"},
	})
	if err != nil {
		t.Fatal(err)
	}
	apiError := new(openai.APIError)
	if err := client.DeleteFile(t.Context(), created.InputFileID); !errors.As(err, &apiError) || apiError.HTTPStatusCode != http.StatusConflict || !strings.Contains(apiError.Message, created.ID) {
		t.Errorf("delete of a file in use: %v", err)
	}
	awaitBatch(t, client, created.ID, func(b openai.Batch) bool { return b.RequestCounts.Completed >= 20 })
	if err := a.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	a, client = start(t, cfg)
	// A user's request does not wait for the batch.
	if text, err := chat(t, client, "small", "me first"); err != nil || text != "me first " {
		t.Errorf("chat beside a batch: %q, %v", text, err)
	}
	b := awaitBatch(t, client, created.ID, func(b openai.Batch) bool { return b.CompletedAt != nil })
	if diff := cmp.Diff(want, outcomes(t, client, b)); diff != "" {
		t.Errorf("outcomes (-want +got)\n%s", diff)
	}
	if b.Status != "completed" || b.RequestCounts != (openai.BatchRequestCounts{Total: 302, Completed: 300, Failed: 2}) || b.Metadata["k"] != "v" || b.Errors != nil {
		t.Errorf("batch %+v", b)
	}

	// One with errors, one that is cancelled.
	bad, err := client.CreateFileBytes(t.Context(), openai.FileBytesRequest{Name: "bad.jsonl", Purpose: openai.PurposeBatch, Bytes: []byte("{}\n")})
	if err != nil {
		t.Fatal(err)
	}
	failed, err := client.CreateBatch(t.Context(), openai.CreateBatchRequest{InputFileID: bad.ID, Endpoint: openai.BatchEndpointEmbeddings})
	if err != nil {
		t.Fatal(err)
	}
	b = awaitBatch(t, client, failed.ID, func(b openai.Batch) bool { return b.FailedAt != nil })
	if b.Status != "failed" || b.Errors == nil || *b.Errors.Data[0].Line != 1 || *b.Errors.Data[0].Param != "custom_id" {
		t.Errorf("failed batch %+v", b)
	}
	upload = openai.UploadBatchFileRequest{}
	ask("a", "small", "slow")
	slow, err := client.CreateBatchWithUploadFile(t.Context(), openai.CreateBatchWithUploadFileRequest{Endpoint: openai.BatchEndpointChatCompletions, UploadBatchFileRequest: upload})
	if err != nil {
		t.Fatal(err)
	}
	awaitBatch(t, client, slow.ID, func(b openai.Batch) bool { return b.InProgressAt != nil })
	if _, err := client.CancelBatch(t.Context(), slow.ID); err != nil {
		t.Fatal(err)
	}
	b = awaitBatch(t, client, slow.ID, func(b openai.Batch) bool { return b.CancelledAt != nil })
	if diff := cmp.Diff(map[string]string{"a": "batch_cancelled"}, outcomes(t, client, b)); diff != "" {
		t.Errorf("outcomes of the cancelled batch (-want +got)\n%s", diff)
	}
	limit := 2
	list, err := client.ListBatch(t.Context(), nil, &limit)
	if err != nil || len(list.Data) != 2 || !list.HasMore || list.Data[0].ID != slow.ID || list.LastID != failed.ID {
		t.Errorf("list %+v, %v", list, err)
	}
	if list, err = client.ListBatch(t.Context(), &list.LastID, nil); err != nil || len(list.Data) != 1 || list.HasMore {
		t.Errorf("second page %+v, %v", list, err)
	}
	if err := a.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	if left := children(t); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
}
