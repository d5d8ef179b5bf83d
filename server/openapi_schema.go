package server

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/batch"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

// schema is a JSON schema.
type schema map[string]any

// schemas makes JSON schemas (2020-12) of the API's Go types, under the names that components have.
//
// A type is described as it is written (answers) or as it is read (requests): in an answer a field without omitempty is
// required and a pointer may be null; in a request every field that is not listed in required may be absent or null.
type schemas struct {
	components map[string]any
	used       map[string]bool // keys of shapes that a type asked for
}

// of returns the schema of t, a reference for structs that have a name.
func (s *schemas) of(t reflect.Type, request bool) schema {
	if shape, ok := typeShapes[t]; ok {
		return shape(s, request)
	}
	switch t.Kind() {
	case reflect.Pointer:
		if request {
			return s.of(t.Elem(), request)
		}
		return nullable(s.of(t.Elem(), request))
	case reflect.Slice, reflect.Array:
		return arrayOf(s.of(t.Elem(), request))
	case reflect.Map:
		return schema{"type": "object", "additionalProperties": s.of(t.Elem(), request)}
	case reflect.String:
		return schema{"type": "string"}
	case reflect.Bool:
		return schema{"type": "boolean"}
	case reflect.Int, reflect.Int32, reflect.Int64:
		return schema{"type": "integer"}
	case reflect.Float32, reflect.Float64:
		return schema{"type": "number"}
	case reflect.Interface:
		return schema{}
	case reflect.Struct:
		if t.Name() == "" {
			return s.object(t, request)
		}
		name := componentName(t, request)
		if _, ok := s.components[name]; !ok {
			s.components[name] = nil // for types that hold themselves
			s.components[name] = s.object(t, request)
		}
		return schema{"$ref": "#/components/schemas/" + name}
	}
	panic("a type of the API that has no schema: " + t.String()) // found by the first test that asks for the document
}

// componentName is the type's name, without the packages of type parameters; types of requests that answers have too are Inputs.
func componentName(t reflect.Type, request bool) string {
	name := t.Name()
	if base, parameter, ok := strings.Cut(name, "["); ok {
		name = base + parameter[strings.LastIndexAny(parameter, "./")+1:len(parameter)-1]
	}
	if request && !strings.HasSuffix(name, "Request") {
		name += "Input"
	}
	return name
}

func (s *schemas) object(t reflect.Type, request bool) schema {
	properties, needed := schema{}, []string{}
	s.fields(t, request, func(field reflect.StructField, name string, optional bool) {
		key := componentName(t, request) + "." + name
		shape, ok := shapes[key]
		if ok {
			s.used[key] = true
		}
		if !ok || shape["type"] == nil && shape["anyOf"] == nil { // only bounds
			whole := maps.Clone(s.of(field.Type, request))
			maps.Copy(whole, shape)
			shape = whole
		}
		must := !optional
		if request {
			if must = slices.Contains(required[componentName(t, request)], name); !must {
				shape = nullable(shape)
			}
		}
		if must {
			needed = append(needed, name)
		}
		properties[name] = shape
	})
	object := schema{"type": "object", "properties": properties}
	if len(needed) > 0 {
		object["required"] = needed
	}
	return object
}

// fields calls f with every field that encoding/json knows, those of embedded structs included.
func (s *schemas) fields(t reflect.Type, request bool, f func(field reflect.StructField, name string, optional bool)) {
	for field := range fieldsOf(t) {
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		switch {
		case field.Anonymous && name == "":
			s.fields(field.Type, request, f)
		case name != "" && name != "-":
			f(field, name, strings.Contains(options, "omit"))
		}
	}
}

func fieldsOf(t reflect.Type) func(yield func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for i := range t.NumField() {
			if !yield(t.Field(i)) {
				return
			}
		}
	}
}

func arrayOf(items schema) schema { return schema{"type": "array", "items": items} }

// nullable is s or null.
func nullable(s schema) schema {
	if t, ok := s["type"].(string); ok {
		s = maps.Clone(s)
		s["type"] = []string{t, "null"}
		if values, ok := s["enum"].([]any); ok {
			s["enum"] = append(slices.Clone(values), nil)
		}
		return s
	}
	if len(s) == 0 || s["anyOf"] == nil {
		return schema{"anyOf": []any{s, schema{"type": "null"}}}
	}
	return schema{"anyOf": append(slices.Clone(s["anyOf"].([]any)), schema{"type": "null"})}
}

func oneOf(values ...any) schema {
	s := schema{"enum": values}
	if _, ok := values[0].(string); ok {
		s["type"] = "string"
	}
	return s
}

func either(alternatives ...any) schema { return schema{"anyOf": alternatives} }

func between(kind string, low, high any) schema {
	return schema{"type": kind, "minimum": low, "maximum": high}
}

var (
	anyObject  = schema{"type": "object"}
	text       = schema{"type": "string"}
	someText   = schema{"type": "string", "minLength": 1}
	boolean    = schema{"type": "boolean"}
	jsonSchema = either(anyObject, boolean)
	// anySchema is a JSON schema, or a string that holds one.
	anySchema = either(anyObject, boolean, text)
	tokenIDs  = schema{"type": "array", "items": between("integer", 0, maxTokenID), "minItems": 1}
	texts     = either(text, tokenIDs, schema{"type": "array", "items": either(text, tokenIDs), "minItems": 1})
)

func auto(number schema) func(*schemas, bool) schema {
	return func(*schemas, bool) schema { return either(oneOf("auto"), number) }
}

func fixed(shape schema) func(*schemas, bool) schema {
	return func(*schemas, bool) schema { return shape }
}

// typeShapes are the types that write or read themselves.
var typeShapes map[reflect.Type]func(s *schemas, request bool) schema

func init() { //nolint:gochecknoinits // the shapes refer to schemas.of, which looks them up
	typeShapes = map[reflect.Type]func(s *schemas, request bool) schema{
		reflect.TypeFor[wire.Auto[int]]():     auto(schema{"type": "integer"}),
		reflect.TypeFor[wire.Auto[float64]](): auto(schema{"type": "number"}),
		reflect.TypeFor[wire.StringList]():    fixed(either(text, arrayOf(text))),
		reflect.TypeFor[wire.Texts]():         fixed(texts),
		reflect.TypeFor[wire.TokenIDs]():      fixed(tokenIDs),
		reflect.TypeFor[wire.FinishReason]():  fixed(nullable(oneOf("stop", "length", "tool_calls"))),
		reflect.TypeFor[wire.Vector]():        fixed(either(schema{"type": "array", "items": schema{"type": "number"}}, text)),
		reflect.TypeFor[wire.ChoiceValue]():   fixed(either(text, boolean)),
		reflect.TypeFor[wire.DecisionInput](): func(s *schemas, request bool) schema {
			return either(someText, arrayOf(s.of(reflect.TypeFor[wire.Message](), request)))
		},
		reflect.TypeFor[wire.DecisionAnswer](): func(s *schemas, request bool) schema {
			return either(s.of(reflect.TypeFor[wire.PredicateAnswer](), request), s.of(reflect.TypeFor[wire.ChoiceAnswer](), request),
				s.of(reflect.TypeFor[wire.ScoreAnswer](), request))
		},
		reflect.TypeFor[wire.Nullable[string]](): fixed(nullable(text)),
		reflect.TypeFor[wire.Nullable[wire.Usage]](): func(s *schemas, request bool) schema {
			return nullable(s.of(reflect.TypeFor[wire.Usage](), request))
		},
		reflect.TypeFor[json.RawMessage](): fixed(schema{}),
	}
}

// required are the fields that a request must have.
var required = map[string][]string{
	"ChatCompletionRequest":       {"model", "messages"},
	"CompletionRequest":           {"model", "prompt"},
	"EmbeddingRequest":            {"model", "input"},
	"DecisionRequest":             {"model", "input", "questions"},
	"DecisionQuestionInput":       {"type", "instructions"},
	"DecisionChoiceInput":         {"value"},
	"DecisionLevelInput":          {"label"},
	"DetokenizeRequest":           {"tokens"},
	"MessageInput":                {"role"},
	"ToolCallInput":               {"id", "function"},
	"FunctionCallInput":           {"name"},
	"ToolInput":                   {"type", "function"},
	"FunctionInput":               {"name"},
	"ResponseFormatInput":         {"type"},
	"JSONSchemaInput":             {"schema"},
	"FineTuningJobRequest":        {"model", "training_file"},
	"CheckpointPermissionRequest": {"project_ids"},
	"FineTuningMethodInput":       {"type"},
	"UploadRequest":               {"filename", "purpose", "bytes", "mime_type"},
	"CompleteUploadRequest":       {"part_ids"},
	"BatchRequest":                {"input_file_id", "endpoint", "completion_window"},
	"ExpiresAfterInput":           {"anchor", "seconds"},
}

// honeOptions describe the object `hone` of a job's request.
func honeOptions() schema {
	properties := schema{}
	for _, option := range finetune.KnownOptions() {
		kind := map[string]schema{
			"strings": either(text, schema{"type": "array", "items": text, "minItems": 1}), "integers": {"type": "array", "items": schema{"type": "integer"}, "minItems": 1},
			"string": either(text, boolean), // init_lora_weights: true
		}[option.Kind]
		if kind == nil {
			kind = schema{"type": option.Kind}
		}
		properties[option.Name] = schema{"anyOf": []any{kind, oneOf("auto"), schema{"type": "null"}}, "description": option.Help}
	}
	return schema{"type": "object", "properties": properties, "additionalProperties": false}
}

// metadata are OpenAI's pairs.
var metadata = schema{"type": "object", "maxProperties": 16, "propertyNames": schema{"maxLength": 64}, "additionalProperties": schema{"type": "string", "maxLength": 512}}

// shapes say more of a field than its type, by the component and the name.
var shapes = map[string]schema{
	"ChatCompletionRequest.messages":              {"minItems": 1, "maxItems": maxMessages},
	"ChatCompletionRequest.max_tokens":            {"type": "integer", "minimum": 1},
	"ChatCompletionRequest.max_completion_tokens": {"type": "integer", "minimum": 1},
	"ChatCompletionRequest.top_logprobs":          between("integer", 0, maxTopLogProbs),
	"ChatCompletionRequest.tools":                 {"type": "array", "items": schema{"$ref": "#/components/schemas/ToolInput"}, "maxItems": maxTools},
	"ChatCompletionRequest.tool_choice":           either(oneOf(child.ToolNone, child.ToolAuto, child.ToolRequired), schema{"$ref": "#/components/schemas/ToolInput"}),
	"ChatCompletionRequest.reasoning_effort":      {"type": "string", "enum": anys(reasoningEfforts)},
	"CompletionRequest.max_tokens":                {"type": "integer", "minimum": 0},
	"CompletionRequest.logprobs":                  between("integer", 0, maxTopLogProbs),
	"EmbeddingRequest.encoding_format":            oneOf("float", "base64"),
	"EmbeddingRequest.input":                      texts,
	"DecisionRequest.questions":                   {"minItems": 1, "maxItems": maxQuestions},
	"DecisionQuestionInput.type":                  oneOf(wire.DecisionChoiceType, wire.DecisionPredicateType, wire.DecisionScoreType),
	"DecisionQuestionInput.instructions":          someText,
	"TokenizeRequest.tools":                       {"type": "array", "items": schema{"$ref": "#/components/schemas/ToolInput"}, "maxItems": maxTools},
	"MessageInput.role":                           oneOf("system", "developer", "user", "assistant", "tool"),
	"MessageInput.content": either(text, schema{"type": "array", "items": schema{"type": "object", "required": []string{"type", "text"},
		"properties": schema{"type": oneOf("text", "input_text"), "text": text}}}),
	"ToolInput.type":           oneOf("function"),
	"FunctionInput.name":       {"type": "string", "pattern": toolName.String()},
	"FunctionInput.parameters": anyObject,
	"FunctionCallInput.name":   {"type": "string", "pattern": toolName.String()},
	"ToolCallInput.type":       oneOf("function"),
	"ToolCallInput.id":         someText,

	"ResponseFormatInput.type":          oneOf("text", "json_object", "json_schema"),
	"ResponseFormatInput.schema":        jsonSchema,
	"JSONSchemaInput.schema":            jsonSchema,
	"StructuredOutputsInput.json":       anySchema,
	"FineTuningMethodInput.type":        oneOf(finetune.Supervised, finetune.DPO),
	"FineTuningJobRequest.hone":         honeOptions(),
	"FineTuningJobRequest.suffix":       {"type": "string", "minLength": 1, "maxLength": 64},
	"FineTuningJobRequest.seed":         between("integer", 0, 1<<31-1),
	"FineTuningJobRequest.metadata":     metadata,
	"FineTuningJobRequest.integrations": {"type": "array", "maxItems": 0},

	"CheckpointPermissionRequest.project_ids": {"minItems": 1},
	"CheckpointPermission.object":             oneOf("checkpoint.permission"),

	"UploadRequest.filename":         someText,
	"UploadRequest.purpose":          {"type": "string", "enum": anys(purposes)},
	"UploadRequest.bytes":            between("integer", 1, int64(maxUploadBytes)),
	"UploadRequest.mime_type":        {"type": "string", "pattern": "/"},
	"CompleteUploadRequest.part_ids": {"minItems": 1},
	"CompleteUploadRequest.md5":      {"type": "string", "pattern": "^[0-9a-fA-F]{32}$"},
	"ExpiresAfterInput.anchor":       oneOf("created_at"),
	"ExpiresAfterInput.seconds":      between("integer", minLifetime, maxLifetime),
	"BatchRequest.endpoint":          {"type": "string", "enum": anys(batch.Endpoints())},
	"BatchRequest.completion_window": oneOf(batch.Window),
	"BatchRequest.metadata":          metadata,

	"Upload.object":     oneOf("upload"),
	"Upload.status":     oneOf(store.UploadPending, store.UploadCompleted, store.UploadCancelled, store.UploadExpired),
	"UploadPart.object": oneOf("upload.part"),
	"Batch.object":      oneOf("batch"),
	"Batch.status": oneOf(batch.Validating, batch.Failed, batch.InProgress, batch.Finalizing, batch.Completed, batch.Expired, batch.Cancelling,
		batch.Cancelled),
	"Batch.metadata":     {"type": []string{"object", "null"}, "additionalProperties": text},
	"BatchErrors.object": oneOf("list"),

	"ChatCompletion.object":           oneOf("chat.completion"),
	"ChatCompletionChunk.object":      oneOf("chat.completion.chunk"),
	"ChatMessage.role":                oneOf("assistant"),
	"Completion.object":               oneOf("text_completion"),
	"CompletionLogProbs.top_logprobs": arrayOf(nullable(schema{"type": "object", "additionalProperties": schema{"type": "number"}})),
	"EmbeddingList.object":            oneOf("list"),
	"Embedding.object":                oneOf("embedding"),
	"Model.object":                    oneOf("model"),
	"File.object":                     oneOf("file"),
	"File.status":                     oneOf("uploaded", "processed", "error"),
	"LogProbs.refusal":                nullable(arrayOf(schema{"$ref": "#/components/schemas/TokenLogProb"})),
	"TokenizeResponse.token_strs":     nullable(arrayOf(text)),
	"FineTuningJob.object":            oneOf("fine_tuning.job"),
	"FineTuningJob.status":            oneOf("validating_files", "queued", "running", "succeeded", "failed", "cancelled"),
	"FineTuningJob.integrations":      {"type": []string{"array", "null"}},
	"FineTuningDetails.options":       anyObject,
	"FineTuningDetails.plan":          anyObject,
	"FineTuningDetails.paused":        oneOf(finetune.PausedByRequest, finetune.PausedForSpace),
	"FineTuningDryRun.object":         oneOf("fine_tuning.job.dry_run"),
	"FineTuningDryRun.options":        anyObject,
	"FineTuningDryRun.plan":           anyObject,
	"FineTuningJobEvent.object":       oneOf("fine_tuning.job.event"),
	"FineTuningJobEvent.level":        oneOf("info", "warn", "error"),
	"FineTuningJobEvent.type":         oneOf("message", "metrics"),
	"FineTuningJobEvent.data":         anyObject,
	"FineTuningJobCheckpoint.object":  oneOf("fine_tuning.job.checkpoint"),
	"FineTuningJobCheckpoint.metrics": anyObject,
}

func anys[T any](list []T) []any {
	out := make([]any, len(list))
	for i, v := range list {
		out[i] = v
	}
	return out
}
