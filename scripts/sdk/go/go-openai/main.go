// Uses a running server with github.com/sashabaranov/go-openai, as its users do. Ends with code 1 at the first answer that is
// not as expected.
//
//	go run ./go-openai http://127.0.0.1:8080/v1 ../train.jsonl
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	openai "github.com/sashabaranov/go-openai"
	"github.com/sashabaranov/go-openai/jsonschema"
)

const model = "SmolLM2-135M-Instruct"

func expect(what string, holds bool, got any) {
	if !holds {
		fmt.Printf("FAIL %s: %+v\n", what, got)
		os.Exit(1)
	}
	fmt.Println("ok  ", what)
}

func must[T any](v T, err error) T {
	if err != nil {
		fmt.Println("FAIL", err)
		os.Exit(1)
	}
	return v
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	config := openai.DefaultConfig("any")
	config.BaseURL = os.Args[1]
	client := openai.NewClientWithConfig(config)
	chats(ctx, client)
	file, tuned := finetune(ctx, client, os.Args[2])
	batch(ctx, client, tuned)

	expect("tuned model: is deleted", must(client.DeleteFineTuneModel(ctx, tuned)).Deleted, nil)
	_, err := client.GetModel(ctx, tuned)
	refused := new(openai.APIError)
	expect("tuned model: is gone", errors.As(err, &refused) && refused.HTTPStatusCode == 404 && refused.Code == "model_not_found", err)
	expect("file: is deleted", client.DeleteFile(ctx, file) == nil, nil)
}

func question(text string) openai.ChatCompletionRequest {
	return openai.ChatCompletionRequest{Model: model, Messages: []openai.ChatCompletionMessage{{Role: openai.ChatMessageRoleUser, Content: text}}, MaxCompletionTokens: 8, Seed: new(1)}
}

func chats(ctx context.Context, client *openai.Client) {
	expect("models: the base model is listed", slices.ContainsFunc(must(client.ListModels(ctx)).Models, func(m openai.Model) bool { return m.ID == model }), nil)
	request := question("Say hello.")
	chat := must(client.CreateChatCompletion(ctx, request))
	text := chat.Choices[0].Message.Content
	expect("chat: text and usage", text != "" && chat.Usage.TotalTokens == chat.Usage.PromptTokens+chat.Usage.CompletionTokens, chat)

	request.StreamOptions = &openai.StreamOptions{IncludeUsage: true}
	stream := must(client.CreateChatCompletionStream(ctx, request))
	streamed, usage := "", 0
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			expect("stream: no error", false, err)
		}
		for _, choice := range chunk.Choices {
			streamed += choice.Delta.Content
		}
		if chunk.Usage != nil {
			usage = chunk.Usage.TotalTokens
		}
	}
	stream.Close()
	expect("stream: same text as without, with usage", streamed == text && usage == chat.Usage.TotalTokens, streamed)

	request = question("Anna likes tea.")
	request.MaxCompletionTokens = 40
	request.ResponseFormat = &openai.ChatCompletionResponseFormat{Type: openai.ChatCompletionResponseFormatTypeJSONSchema, JSONSchema: &openai.ChatCompletionResponseFormatJSONSchema{
		Name: "person", Strict: true, Schema: &jsonschema.Definition{
			Type: jsonschema.Object, Required: []string{"drink"}, AdditionalProperties: false,
			Properties: map[string]jsonschema.Definition{"drink": {Type: jsonschema.String, Enum: []string{"tea", "coffee"}}},
		},
	}}
	var person struct {
		Drink string `json:"drink"`
	}
	answer := must(client.CreateChatCompletion(ctx, request)).Choices[0].Message.Content
	expect("json_schema: an object of the schema", json.Unmarshal([]byte(answer), &person) == nil && (person.Drink == "tea" || person.Drink == "coffee"), answer)

	request = question("What is the weather in Paris?")
	request.MaxCompletionTokens = 60
	request.Tools = []openai.Tool{{Type: openai.ToolTypeFunction, Function: &openai.FunctionDefinition{Name: "get_weather", Parameters: jsonschema.Definition{
		Type: jsonschema.Object, Required: []string{"city"}, Properties: map[string]jsonschema.Definition{"city": {Type: jsonschema.String, Enum: []string{"Paris", "Rome"}}},
	}}}}
	request.ToolChoice = "required"
	message := must(client.CreateChatCompletion(ctx, request)).Choices[0].Message
	expect("tools: a call", len(message.ToolCalls) > 0 && message.ToolCalls[0].Function.Name == "get_weather", message)

	request = question("A or B?")
	request.GuidedChoice = []string{"A", "B"}
	request.LogProbs, request.TopLogProbs = true, 2
	choice := must(client.CreateChatCompletion(ctx, request)).Choices[0]
	expect("guided_choice: one of the two, with log-probabilities", (choice.Message.Content == "A" || choice.Message.Content == "B") && len(choice.LogProbs.Content[0].TopLogProbs) == 2, choice)

	completion := must(client.CreateCompletion(ctx, openai.CompletionRequest{Model: model, Prompt: "The capital of France is", MaxTokens: 4, LogProbs: 2}))
	expect("completion: text with log-probabilities", completion.Choices[0].Text != "" && len(completion.Choices[0].LogProbs.Tokens) == 4, completion)

	_, err := client.CreateChatCompletion(ctx, openai.ChatCompletionRequest{Model: "no-such-model", Messages: request.Messages})
	refused := new(openai.APIError)
	expect("error: an unknown model", errors.As(err, &refused) && refused.HTTPStatusCode == 404 && refused.Code == "model_not_found", err)
}

func finetune(ctx context.Context, client *openai.Client, path string) (file, tuned string) {
	training := must(os.ReadFile(path))
	upload := must(client.CreateFileBytes(ctx, openai.FileBytesRequest{Name: "train.jsonl", Bytes: training, Purpose: openai.PurposeFineTune}))
	expect("file: its size", upload.Bytes == len(training) && upload.Status == "processed", upload)
	content := must(client.GetFileContent(ctx, upload.ID))
	back := must(io.ReadAll(content))
	content.Close()
	expect("file: the content comes back", string(back) == string(training), len(back))
	expect("file: is listed", slices.ContainsFunc(must(client.ListFiles(ctx)).Files, func(f openai.File) bool { return f.ID == upload.ID }), nil)

	job := must(client.CreateFineTuningJob(ctx, openai.FineTuningJobRequest{Model: model, TrainingFile: upload.ID, Suffix: "go-openai", Hyperparameters: &openai.Hyperparameters{Epochs: 1}}))
	job = ended(ctx, client, job.ID)
	expect("job: succeeded", job.Status == "succeeded" && job.TrainedTokens > 0 && len(job.ResultFiles) >= 1, job)
	events := must(client.ListFineTuningJobEvents(ctx, job.ID, openai.ListFineTuningJobEventsWithLimit(100))).Data
	expect("job: events with the loss in their text", slices.ContainsFunc(events, func(e openai.FineTuneEvent) bool { return strings.Contains(e.Message, "training loss=") }), events)
	request := question("Which is a fruit?")
	request.Model = job.FineTunedModel
	expect("tuned model: answers", must(client.CreateChatCompletion(ctx, request)).Model == job.FineTunedModel, nil)

	second := must(client.CreateFineTuningJob(ctx, openai.FineTuningJobRequest{Model: model, TrainingFile: upload.ID, Hyperparameters: &openai.Hyperparameters{Epochs: 50}}))
	must(client.CancelFineTuningJob(ctx, second.ID))
	expect("job: is cancelled", ended(ctx, client, second.ID).Status == "cancelled", nil)
	return upload.ID, job.FineTunedModel
}

func ended(ctx context.Context, client *openai.Client, id string) openai.FineTuningJob {
	for {
		job := must(client.RetrieveFineTuningJob(ctx, id))
		switch job.Status {
		case "succeeded", "failed", "cancelled":
			return job
		}
		time.Sleep(300 * time.Millisecond)
	}
}

func batch(ctx context.Context, client *openai.Client, tuned string) {
	request := openai.CreateBatchWithUploadFileRequest{Endpoint: openai.BatchEndpointChatCompletions, CompletionWindow: "24h"}
	for i, name := range []string{model, tuned} {
		body := question("Say hello.")
		body.Model = name
		request.AddChatCompletion(fmt.Sprintf("r%d", i), body)
	}
	created := must(client.CreateBatchWithUploadFile(ctx, request))
	batch := must(client.RetrieveBatch(ctx, created.ID))
	for batch.Status != "completed" && batch.Status != "failed" && batch.Status != "expired" {
		time.Sleep(200 * time.Millisecond)
		batch = must(client.RetrieveBatch(ctx, created.ID))
	}
	expect("batch: completed", batch.Status == "completed" && batch.RequestCounts.Completed == 2 && batch.OutputFileID != nil, batch)
	content := must(client.GetFileContent(ctx, *batch.OutputFileID))
	answers := must(io.ReadAll(content))
	content.Close()
	expect("batch: an answer of each model", strings.Contains(string(answers), `"r0"`) && strings.Contains(string(answers), tuned), string(answers))
}
