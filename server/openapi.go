package server

import (
	"bytes"
	"encoding/json"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// operation describes a route in the API's OpenAPI document. A test finds a route that has none, and one without a route.
type operation struct {
	method, path string // as the route is registered
	id, summary  string
	query        []parameter
	once         bool   // takes the header Idempotency-Key
	request      any    // a value of the type of the JSON body; nil: there is none
	form         schema // of a multipart body
	answer       any    // a value of the type of the JSON answer; nil: bytes of media, and without that an error at any rate
	media        string
	stream       any // a value of the type of each event, of requests with stream: true
}

type parameter struct {
	name  string
	shape schema // an object is sent as name[key]=value
}

var (
	after      = parameter{"after", schema{"type": "string"}}
	modelQuery = parameter{"model", schema{"type": "string"}}
)

func limit(most int) parameter { return parameter{"limit", between("integer", 1, most)} }

// binary is a form's file: bytes have no JSON type.
var binary = schema{"contentMediaType": "application/octet-stream"}

type healthAnswer struct {
	Status string             `json:"status"`
	Models []child.ModelState `json:"models,omitzero"` // nil: not told without a key
}

type readyAnswer struct {
	Status string `json:"status"`
}

var operations = []operation{
	{method: "GET", path: "/health", id: "health", summary: "That the server is there, and how it stands with its models", answer: healthAnswer{}},
	{method: "GET", path: "/ready", id: "ready", summary: "Whether the default model can answer, or has to be waited for", answer: readyAnswer{}},
	{method: "GET", path: "/metrics", id: "metrics", summary: "Numbers for Prometheus, in its text format", media: "text/plain"},
	{method: "GET", path: "/debug/pprof/*name", id: "profile", summary: "Profiles of the server, for go tool pprof", media: "*/*"},
	{method: "GET", path: "/openapi.json", id: "openapi", summary: "This document", answer: map[string]any{}},
	{method: "POST", path: "/v1/chat/completions", id: "createChatCompletion", summary: "Answer a conversation",
		request: wire.ChatCompletionRequest{}, answer: wire.ChatCompletion{}, stream: wire.ChatCompletionChunk{}},
	{method: "POST", path: "/v1/completions", id: "createCompletion", summary: "Continue prompts",
		request: wire.CompletionRequest{}, answer: wire.Completion{}, stream: wire.Completion{}},
	{method: "POST", path: "/v1/embeddings", id: "createEmbedding", summary: "Vectors of texts", request: wire.EmbeddingRequest{}, answer: wire.EmbeddingList{}},
	{method: "POST", path: "/v1/decisions", id: "createDecision", summary: "Answer questions about a text with probabilities",
		request: wire.DecisionRequest{}, answer: wire.Decision{}},
	{method: "POST", path: "/v1/tokenize", id: "tokenize", summary: "Token ids of a text or a conversation", request: wire.TokenizeRequest{}, answer: wire.TokenizeResponse{}},
	{method: "POST", path: "/v1/detokenize", id: "detokenize", summary: "Text of token ids", request: wire.DetokenizeRequest{}, answer: wire.DetokenizeResponse{}},
	{method: "GET", path: "/v1/tokenizer_info", id: "tokenizerInfo", summary: "What a model's tokenizer is", query: []parameter{modelQuery}, answer: wire.TokenizerInfo{}},
	{method: "POST", path: "/tokenize", id: "tokenizeAtRoot", summary: "As /v1/tokenize", request: wire.TokenizeRequest{}, answer: wire.TokenizeResponse{}},
	{method: "POST", path: "/detokenize", id: "detokenizeAtRoot", summary: "As /v1/detokenize", request: wire.DetokenizeRequest{}, answer: wire.DetokenizeResponse{}},
	{method: "GET", path: "/tokenizer_info", id: "tokenizerInfoAtRoot", summary: "As /v1/tokenizer_info", query: []parameter{modelQuery}, answer: wire.TokenizerInfo{}},
	{method: "GET", path: "/v1/models", id: "listModels", summary: "List base and tuned models", answer: wire.List[wire.Model]{}},
	{method: "GET", path: "/v1/models/*id", id: "retrieveModel", summary: "Retrieve a model", answer: wire.Model{}},
	{method: "DELETE", path: "/v1/models/*id", id: "deleteModel", summary: "Delete a tuned model, or a base model that nothing needs", answer: wire.Deleted{}},
	{method: "POST", path: "/v1/files", id: "createFile", once: true, summary: "Upload a file", answer: wire.File{}, form: schema{
		"type": "object", "required": []string{"purpose", "file"}, "properties": schema{
			"purpose": schema{"type": "string", "enum": anys(purposes)},
			"file":    binary,

			"expires_after[anchor]":  oneOf("created_at"),
			"expires_after[seconds]": between("integer", minLifetime, maxLifetime),
		},
	}},
	{method: "GET", path: "/v1/files", id: "listFiles", summary: "List files", answer: wire.List[wire.File]{},
		query: []parameter{after, limit(10000), {"order", oneOf("asc", "desc")}, {"purpose", text}}},
	{method: "GET", path: "/v1/files/:id", id: "retrieveFile", summary: "Retrieve a file's description", answer: wire.File{}},
	{method: "GET", path: "/v1/files/:id/content", id: "downloadFile", summary: "A file's bytes", media: "application/octet-stream"},
	{method: "DELETE", path: "/v1/files/:id", id: "deleteFile", summary: "Delete a file", answer: wire.Deleted{}},
	{method: "POST", path: "/v1/uploads", id: "createUpload", once: true, summary: "Begin a file that comes in parts", request: wire.UploadRequest{}, answer: wire.Upload{}},
	{method: "POST", path: "/v1/uploads/:id/parts", id: "addUploadPart", once: true, summary: "Add a part to an upload", answer: wire.UploadPart{}, form: schema{
		"type": "object", "required": []string{"data"}, "properties": schema{
			"data": binary,
		},
	}},
	{method: "POST", path: "/v1/uploads/:id/complete", id: "completeUpload", once: true, summary: "Join the parts to a file", request: wire.CompleteUploadRequest{}, answer: wire.Upload{}},
	{method: "POST", path: "/v1/uploads/:id/cancel", id: "cancelUpload", summary: "Give an upload up", answer: wire.Upload{}},
	{method: "POST", path: "/v1/batches", id: "createBatch", once: true, summary: "Answer the requests of a file", request: wire.BatchRequest{}, answer: wire.Batch{}},
	{method: "GET", path: "/v1/batches", id: "listBatches", summary: "List batches, newest first", query: []parameter{after, limit(100)}, answer: wire.List[wire.Batch]{}},
	{method: "GET", path: "/v1/batches/:id", id: "retrieveBatch", summary: "Retrieve a batch", answer: wire.Batch{}},
	{method: "POST", path: "/v1/batches/:id/cancel", id: "cancelBatch", summary: "Let a batch end with the answers that it has", answer: wire.Batch{}},
	{method: "POST", path: "/v1/fine_tuning/jobs", id: "createFineTuningJob", once: true, summary: "Create a fine-tuning job",
		request: wire.FineTuningJobRequest{}, answer: wire.FineTuningJob{}},
	{method: "POST", path: "/v1/fine_tuning/jobs/dry_run", id: "dryRunFineTuningJob", summary: "What a job of the same request would do",
		request: wire.FineTuningJobRequest{}, answer: wire.FineTuningDryRun{}},
	{method: "GET", path: "/v1/fine_tuning/jobs", id: "listFineTuningJobs", summary: "List jobs, newest first",
		query:  []parameter{after, limit(1000), {"metadata", schema{"type": "object", "additionalProperties": text, "maxProperties": maxMetadata}}},
		answer: wire.List[wire.FineTuningJob]{}},
	{method: "GET", path: "/v1/fine_tuning/jobs/:id", id: "retrieveFineTuningJob", summary: "Retrieve a job", answer: wire.FineTuningJob{}},
	{method: "POST", path: "/v1/fine_tuning/jobs/:id/cancel", id: "cancelFineTuningJob", summary: "Cancel a job", answer: wire.FineTuningJob{}},
	{method: "POST", path: "/v1/fine_tuning/jobs/:id/pause", id: "pauseFineTuningJob", summary: "Let a job wait", answer: wire.FineTuningJob{}},
	{method: "POST", path: "/v1/fine_tuning/jobs/:id/resume", id: "resumeFineTuningJob", summary: "Let a job that waits go on", answer: wire.FineTuningJob{}},
	{method: "GET", path: "/v1/fine_tuning/jobs/:id/events", id: "listFineTuningEvents", summary: "A job's events, newest first",
		query: []parameter{after, limit(1000)}, answer: wire.List[wire.FineTuningJobEvent]{}},
	{method: "GET", path: "/v1/fine_tuning/jobs/:id/checkpoints", id: "listFineTuningJobCheckpoints", summary: "A job's checkpoints, newest first",
		query: []parameter{after, limit(1000)}, answer: wire.List[wire.FineTuningJobCheckpoint]{}},
	{method: "GET", path: "/v1/fine_tuning/checkpoints/:checkpoint/permissions", id: "listFineTuningCheckpointPermissions", summary: "Who may use a checkpoint",
		query:  []parameter{after, limit(1000), {"order", oneOf("ascending", "descending")}, {"project_id", text}},
		answer: wire.List[wire.CheckpointPermission]{}},
	{method: "POST", path: "/v1/fine_tuning/checkpoints/:checkpoint/permissions", id: "createFineTuningCheckpointPermission", summary: "As the list: there is one project",
		request: wire.CheckpointPermissionRequest{}, answer: wire.List[wire.CheckpointPermission]{}},
	{method: "DELETE", path: "/v1/fine_tuning/checkpoints/:checkpoint/permissions/:permission", id: "deleteFineTuningCheckpointPermission",
		summary: "Refused: the only project's permission stays"},
}

// openAPI answers GET /openapi.json.
func (s *Server) openAPI(c *gin.Context) error {
	return encode(c, http.StatusOK, openAPIDocument())
}

// openAPIDocument describes the API. It follows from the code alone.
var openAPIDocument = sync.OnceValue(func() json.RawMessage {
	document, _ := describe(operations)
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(document); err != nil {
		panic("an OpenAPI document that is not JSON: " + err.Error())
	}
	return b.Bytes()
})

// describe makes the document of list, and the schemas that it needed.
func describe(list []operation) (document schema, all *schemas) {
	all = &schemas{components: map[string]any{}, used: map[string]bool{}}
	// Tools are kept as they were sent, so no field has their type.
	all.of(reflect.TypeFor[wire.Tool](), true)
	refused := schema{"description": "OpenAI's error object", "content": schema{"application/json": schema{"schema": all.of(reflect.TypeFor[wire.ErrorResponse](), false)}}}
	paths := map[string]schema{}
	for _, op := range list {
		path, names := templatePath(op.path)
		var parameters []any
		for _, name := range names {
			parameters = append(parameters, schema{"name": name, "in": "path", "required": true, "schema": someText})
		}
		for _, p := range op.query {
			parameter := schema{"name": p.name, "in": "query", "schema": p.shape}
			if p.shape["type"] == "object" {
				parameter["style"], parameter["explode"] = "deepObject", true
			}
			parameters = append(parameters, parameter)
		}
		if op.once {
			parameters = append(parameters, schema{"name": idempotencyHeader, "in": "header", "schema": schema{
				"type": "string", "minLength": 1, "maxLength": maxIdempotencyKeyBytes, "pattern": "^[!-~]+$",
			}})
		}
		content := schema{}
		responses := schema{"4XX": refused, "5XX": refused}
		if op.answer != nil {
			content["application/json"] = schema{"schema": all.of(reflect.TypeOf(op.answer), false)}
		} else if op.media != "" {
			content[op.media] = schema{"schema": schema{}}
		}
		if op.stream != nil {
			content["text/event-stream"] = schema{"schema": all.of(reflect.TypeOf(op.stream), false)}
		}
		if len(content) > 0 {
			responses["200"] = schema{"description": "OK", "content": content}
		}
		described := schema{"operationId": op.id, "summary": op.summary, "responses": responses}
		if routes[op.method+" "+op.path].scopes != nil {
			described["security"] = []any{schema{"key": []string{}}, schema{}} // or none, where no keys are configured
		}
		if parameters != nil {
			described["parameters"] = parameters
		}
		switch {
		case op.request != nil:
			described["requestBody"] = schema{"required": true, "content": schema{"application/json": schema{"schema": all.of(reflect.TypeOf(op.request), true)}}}
		case op.form != nil:
			described["requestBody"] = schema{"required": true, "content": schema{"multipart/form-data": schema{"schema": op.form}}}
		}
		if paths[path] == nil {
			paths[path] = schema{}
		}
		paths[path][strings.ToLower(op.method)] = described
	}
	return schema{
		"openapi": "3.1.0",
		"info": schema{
			"title": "hone", "version": "1",
			"description": "OpenAI's API, served locally, with what hone adds to it in objects named hone and in fields of other local servers.",
			"license":     schema{"name": "Apache-2.0", "identifier": "Apache-2.0"},
		},
		"paths": paths, "components": schema{"schemas": all.components, "securitySchemes": schema{
			"key": schema{"type": "http", "scheme": "bearer", "description": "An API key. A server without configured keys needs none."},
		}},
	}, all
}

// templatePath turns gin's :id and *id into {id}, and returns the names.
func templatePath(path string) (string, []string) {
	var names []string
	parts := strings.Split(path, "/")
	for i, part := range parts {
		if strings.HasPrefix(part, ":") || strings.HasPrefix(part, "*") {
			names = append(names, part[1:])
			parts[i] = "{" + part[1:] + "}"
		}
	}
	return strings.Join(parts, "/"), slices.Clip(names)
}
