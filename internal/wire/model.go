package wire

// Model is a name that requests may use: a base model or a tuned one.
type Model struct {
	ID      string        `json:"id"`
	Object  string        `json:"object"` // model
	Created int64         `json:"created"`
	OwnedBy string        `json:"owned_by"`         // hone for a base model, user for a tuned one
	Parent  string        `json:"parent,omitempty"` // base model of a tuned one: vLLM's field
	Hone    *ModelDetails `json:"hone,omitempty"`
}

// ModelDetails is what OpenAI's model object has no fields for.
type ModelDetails struct {
	Kind          string `json:"kind"`   // base, tuned
	Digest        string `json:"digest"` // sha256 of the base model's file, hex
	Architecture  string `json:"architecture,omitempty"`
	ContextTokens int    `json:"context_tokens,omitempty"`
	// The rest describes a tuned model.
	BaseModel        string   `json:"base_model,omitempty"`
	JobID            string   `json:"job_id,omitempty"`
	R                int      `json:"r,omitempty"`
	LoraAlpha        float64  `json:"lora_alpha,omitempty"`
	TargetModules    []string `json:"target_modules,omitempty"`
	QuestionTemplate *string  `json:"question_template,omitempty"` // how training worded a question; predict words it so
	SystemMessage    *string  `json:"system_message,omitempty"`
	Choices          []string `json:"choices,omitempty"`
	MaxLength        int      `json:"max_length,omitempty"`
}

// List is a page of objects. FirstID and LastID are null for an empty page.
type List[T any] struct {
	Object  string  `json:"object"` // list
	Data    []T     `json:"data"`
	FirstID *string `json:"first_id"`
	LastID  *string `json:"last_id"`
	HasMore bool    `json:"has_more"`
}

// Deleted answers every DELETE.
type Deleted struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Deleted bool   `json:"deleted"`
}
