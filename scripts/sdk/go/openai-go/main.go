// Uses a running server with OpenAI's Go SDK, as its users do: models, chats, a file, a job with its events and checkpoints, a
// batch, the tuned model. Ends with code 1 at the first answer that is not as expected.
//
//	go run ./openai-go http://127.0.0.1:8080/v1 ../train.jsonl
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/pagination"
	"github.com/openai/openai-go/v3/shared"
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

// all reads every page.
func all[T any](pages *pagination.CursorPageAutoPager[T]) []T {
	var list []T
	for pages.Next() {
		list = append(list, pages.Current())
	}
	expect("pages: come to an end", pages.Err() == nil, pages.Err())
	return list
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	client := openai.NewClient(option.WithBaseURL(os.Args[1]), option.WithAPIKey("any"), option.WithMaxRetries(0))
	chats(ctx, &client)
	tuned, job := finetune(ctx, &client, os.Args[2])
	batch(ctx, &client, tuned)
	remove(ctx, &client, tuned, job)
}

func question(text string) openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{
		Model: model, Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(text)}, MaxCompletionTokens: openai.Int(8), Temperature: openai.Float(0),
	}
}

func chats(ctx context.Context, client *openai.Client) {
	names := []string{}
	for _, m := range must(client.Models.List(ctx)).Data {
		names = append(names, m.ID)
	}
	expect("models: the base model is listed", slices.Contains(names, model), names)
	expect("models: and found by name", must(client.Models.Get(ctx, model)).ID == model, nil)

	request := question("Say hello.")
	chat := must(client.Chat.Completions.New(ctx, request))
	text := chat.Choices[0].Message.Content
	expect("chat: text and usage", text != "" && chat.Usage.TotalTokens == chat.Usage.PromptTokens+chat.Usage.CompletionTokens, chat)

	request.StreamOptions = openai.ChatCompletionStreamOptionsParam{IncludeUsage: openai.Bool(true)}
	request.Logprobs, request.TopLogprobs = openai.Bool(true), openai.Int(3)
	stream := client.Chat.Completions.NewStreaming(ctx, request)
	whole := openai.ChatCompletionAccumulator{}
	tops := 0
	for stream.Next() {
		chunk := stream.Current()
		quietly("stream: a chunk fits to those before", whole.AddChunk(chunk), chunk)
		for _, choice := range chunk.Choices {
			for _, token := range choice.Logprobs.Content {
				tops += len(token.TopLogprobs)
			}
		}
	}
	expect("stream: same text as without, with usage", stream.Err() == nil && whole.Choices[0].Message.Content == text && whole.Usage.TotalTokens == chat.Usage.TotalTokens, whole)
	expect("stream: three alternatives a token", tops == 3*int(whole.Usage.CompletionTokens), tops)

	request = question("Anna likes tea.")
	request.MaxCompletionTokens = openai.Int(40)
	shape := map[string]any{"type": "object", "properties": map[string]any{"drink": map[string]any{"enum": []string{"tea", "coffee"}}}, "required": []string{"drink"}, "additionalProperties": false}
	request.ResponseFormat = openai.ChatCompletionNewParamsResponseFormatUnion{OfJSONSchema: &shared.ResponseFormatJSONSchemaParam{
		JSONSchema: shared.ResponseFormatJSONSchemaJSONSchemaParam{Name: "person", Schema: shape, Strict: openai.Bool(true)},
	}}
	var person struct {
		Drink string `json:"drink"`
	}
	answer := must(client.Chat.Completions.New(ctx, request)).Choices[0].Message.Content
	expect("json_schema: an object of the schema", json.Unmarshal([]byte(answer), &person) == nil && (person.Drink == "tea" || person.Drink == "coffee"), answer)

	request = question("What is the weather in Paris?")
	request.MaxCompletionTokens = openai.Int(60)
	request.Tools = []openai.ChatCompletionToolUnionParam{openai.ChatCompletionFunctionTool(shared.FunctionDefinitionParam{
		Name: "get_weather", Parameters: shared.FunctionParameters{"type": "object", "properties": map[string]any{"city": map[string]any{"enum": []string{"Paris", "Rome"}}}, "required": []string{"city"}},
	})}
	request.ToolChoice = openai.ChatCompletionToolChoiceOptionUnionParam{OfAuto: openai.String("required")}
	message := must(client.Chat.Completions.New(ctx, request)).Choices[0].Message
	expect("tools: a call", len(message.ToolCalls) > 0 && message.ToolCalls[0].Function.Name == "get_weather", message)
	request.Messages = append(request.Messages, message.ToParam())
	for _, call := range message.ToolCalls {
		request.Messages = append(request.Messages, openai.ToolMessage("rain", call.ID))
	}
	request.ToolChoice = openai.ChatCompletionToolChoiceOptionUnionParam{OfAuto: openai.String("none")}
	expect("tools: the result is taken", must(client.Chat.Completions.New(ctx, request)).Choices[0].Message.Content != "", nil)

	request = question("A or B?")
	request.Logprobs, request.TopLogprobs = openai.Bool(true), openai.Int(2)
	choice := must(client.Chat.Completions.New(ctx, request, option.WithJSONSet("guided_choice", []string{"A", "B"}))).Choices[0]
	sum := 0.0
	for _, top := range choice.Logprobs.Content[0].TopLogprobs {
		sum += math.Exp(top.Logprob)
	}
	expect("guided_choice: probabilities sum to 1", math.Abs(sum-1) < 1e-3, sum)

	vectors := must(client.Embeddings.New(ctx, openai.EmbeddingNewParams{Model: model, Input: openai.EmbeddingNewParamsInputUnion{OfArrayOfStrings: []string{"a cat", "the economy"}}}))
	expect("embeddings: one vector a text", len(vectors.Data) == 2 && len(vectors.Data[0].Embedding) > 100, len(vectors.Data))

	request = question("x")
	request.Model = "no-such-model"
	_, err := client.Chat.Completions.New(ctx, request)
	refused := new(openai.Error)
	expect("error: an unknown model", errors.As(err, &refused) && refused.StatusCode == 404 && refused.Code == "model_not_found" && refused.Param == "model", err)
}

// quietly speaks only of what is wrong.
func quietly(what string, holds bool, got any) {
	if !holds {
		expect(what, holds, got)
	}
}

func finetune(ctx context.Context, client *openai.Client, path string) (tuned string, job *openai.FineTuningJob) {
	training := must(os.ReadFile(path))
	file := must(client.Files.New(ctx, openai.FileNewParams{File: openai.File(strings.NewReader(string(training)), "train.jsonl", "application/jsonl"), Purpose: openai.FilePurposeFineTune}))
	expect("file: its size and status", file.Bytes == int64(len(training)) && file.Status == openai.FileObjectStatusProcessed, file)
	content := must(client.Files.Content(ctx, file.ID))
	back := must(io.ReadAll(content.Body))
	content.Body.Close()
	expect("file: the content comes back", string(back) == string(training), len(back))
	expect("file: is listed", slices.ContainsFunc(all(client.Files.ListAutoPaging(ctx, openai.FileListParams{Limit: openai.Int(1)})), func(f openai.FileObject) bool { return f.ID == file.ID }), nil)

	job = must(client.FineTuning.Jobs.New(ctx, openai.FineTuningJobNewParams{
		Model: model, TrainingFile: file.ID, Suffix: openai.String("go"), Seed: openai.Int(1), Metadata: shared.Metadata{"sdk": "go"},
		Method: openai.FineTuningJobNewParamsMethod{Type: "supervised", Supervised: openai.SupervisedMethodParam{Hyperparameters: openai.SupervisedHyperparameters{
			NEpochs: openai.SupervisedHyperparametersNEpochsUnion{OfInt: openai.Int(1)}, BatchSize: openai.SupervisedHyperparametersBatchSizeUnion{OfInt: openai.Int(4)},
		}}},
	}, option.WithJSONSet("hone", map[string]any{"r": 4})))
	job = ended(ctx, client, job.ID)
	expect("job: succeeded", job.Status == openai.FineTuningJobStatusSucceeded && job.TrainedTokens > 0 && len(job.ResultFiles) >= 1, job.RawJSON())
	expect("job: hyper-parameters", job.Method.Supervised.Hyperparameters.NEpochs.OfInt == 1, job.Method)
	events := all(client.FineTuning.Jobs.ListEventsAutoPaging(ctx, job.ID, openai.FineTuningJobListEventsParams{Limit: openai.Int(3)}))
	metrics := slices.ContainsFunc(events, func(e openai.FineTuningJobEvent) bool {
		return e.Type == "metrics" && strings.Contains(e.JSON.Data.Raw(), "train_loss")
	})
	expect("job: events in pages, with metrics", len(events) > 3 && metrics, len(events))
	checkpoints := all(client.FineTuning.Jobs.Checkpoints.ListAutoPaging(ctx, job.ID, openai.FineTuningJobCheckpointListParams{Limit: openai.Int(1)}))
	expect("job: a checkpoint", len(checkpoints) > 0 && checkpoints[0].Metrics.TrainLoss > 0, checkpoints)
	request := question("Which is a fruit?")
	for _, name := range []string{job.FineTunedModel, checkpoints[0].FineTunedModelCheckpoint} {
		request.Model = name
		answer := must(client.Chat.Completions.New(ctx, request))
		expect("tuned model: answers as "+name, answer.Model == name && answer.Choices[0].FinishReason != "", answer)
	}
	expect("job: is found by its metadata", slices.ContainsFunc(all(client.FineTuning.Jobs.ListAutoPaging(ctx, openai.FineTuningJobListParams{Metadata: map[string]string{"sdk": "go"}})), func(j openai.FineTuningJob) bool { return j.ID == job.ID }), nil)

	second := must(client.FineTuning.Jobs.New(ctx, openai.FineTuningJobNewParams{Model: model, TrainingFile: file.ID}, option.WithJSONSet("hone", map[string]any{"num_train_epochs": 50})))
	must(client.FineTuning.Jobs.Pause(ctx, second.ID))
	must(client.FineTuning.Jobs.Resume(ctx, second.ID))
	must(client.FineTuning.Jobs.Cancel(ctx, second.ID))
	expect("job: paused, resumed, cancelled", ended(ctx, client, second.ID).Status == openai.FineTuningJobStatusCancelled, nil)
	return job.FineTunedModel, job
}

func ended(ctx context.Context, client *openai.Client, id string) *openai.FineTuningJob {
	for {
		job := must(client.FineTuning.Jobs.Get(ctx, id))
		switch job.Status {
		case openai.FineTuningJobStatusSucceeded, openai.FineTuningJobStatusFailed, openai.FineTuningJobStatusCancelled:
			return job
		}
		time.Sleep(300 * time.Millisecond)
	}
}

func batch(ctx context.Context, client *openai.Client, tuned string) {
	var lines strings.Builder
	for i, name := range []string{model, tuned, "no-such-model"} {
		fmt.Fprintf(&lines, `{"custom_id":"r%d","method":"POST","url":"/v1/chat/completions","body":{"model":%q,"messages":[{"role":"user","content":"Say hello."}],"max_tokens":4}}`+"\n", i, name)
	}
	input := must(client.Files.New(ctx, openai.FileNewParams{File: openai.File(strings.NewReader(lines.String()), "batch.jsonl", "application/jsonl"), Purpose: openai.FilePurposeBatch}))
	batch := must(client.Batches.New(ctx, openai.BatchNewParams{
		InputFileID: input.ID, Endpoint: openai.BatchNewParamsEndpointV1ChatCompletions, CompletionWindow: openai.BatchNewParamsCompletionWindow24h,
	}))
	for batch.Status != openai.BatchStatusCompleted && batch.Status != openai.BatchStatusFailed && batch.Status != openai.BatchStatusExpired {
		time.Sleep(200 * time.Millisecond)
		batch = must(client.Batches.Get(ctx, batch.ID))
	}
	expect("batch: completed, one request failed", batch.Status == openai.BatchStatusCompleted && batch.RequestCounts.Completed == 2 && batch.RequestCounts.Failed == 1, batch.RawJSON())
	output := must(client.Files.Content(ctx, batch.OutputFileID))
	answers := must(io.ReadAll(output.Body))
	output.Body.Close()
	expect("batch: two answers in the output", strings.Count(string(answers), `"custom_id"`) == 2 && strings.Contains(string(answers), tuned), string(answers))
	expect("batch: is listed", slices.ContainsFunc(all(client.Batches.ListAutoPaging(ctx, openai.BatchListParams{})), func(b openai.Batch) bool { return b.ID == batch.ID }), nil)
}

func remove(ctx context.Context, client *openai.Client, tuned string, job *openai.FineTuningJob) {
	expect("tuned model: is deleted", must(client.Models.Delete(ctx, tuned)).Deleted, nil)
	_, err := client.Models.Get(ctx, tuned)
	refused := new(openai.Error)
	expect("tuned model: is gone", errors.As(err, &refused) && refused.StatusCode == 404, err)
	expect("file: is deleted", must(client.Files.Delete(ctx, job.TrainingFile)).Deleted, nil)
}
