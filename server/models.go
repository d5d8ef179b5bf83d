package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/wire"
)

// BaseModel is what the API tells and uses of a base model.
type BaseModel struct {
	child.Base
	Architecture  string
	ContextTokens int
	CreatedAt     int64 // Unix seconds
}

// Models are the base models.
type Models interface {
	List(ctx context.Context) ([]BaseModel, error)
	// Get returns finetune.ErrUnknownModel for a name that there is not.
	Get(ctx context.Context, name string) (BaseModel, error)
	// Delete removes a base model's files; what has them open goes on.
	Delete(ctx context.Context, name string) error
}

// Adapters are the tuned models; adapters.Registry implements it.
type Adapters interface {
	List() []adapters.Adapter
	Lookup(name string) (adapters.Adapter, error) // adapters.ErrNotFound
	Acquire(name string) (*adapters.Ref, error)   // adapters.ErrNotFound
	Delete(ctx context.Context, name string) error
}

// tunedPrefix begins the names of tuned models, and of no base model.
const tunedPrefix = "ft:"

// target is what a completion is computed with.
type target struct {
	base    child.Base
	adapter *child.Adapter
	release func() // called when the completion has ended
}

// fingerprint names the base weights: OpenAI's system_fingerprint, which changes when answers may.
func (t *target) fingerprint() string { return fmt.Sprintf("fp_%.12s", t.base.Digest) }

// resolve finds the model of a completion. The caller calls release.
func (s *Server) resolve(ctx context.Context, name string) (*target, error) {
	if name == "" {
		return nil, invalid("model", "model is required; GET /v1/models lists the names")
	}
	if !strings.HasPrefix(name, tunedPrefix) {
		model, err := s.models.Get(ctx, name)
		if errors.Is(err, finetune.ErrUnknownModel) {
			return nil, s.unknownModel(ctx, name)
		}
		if err != nil {
			return nil, fmt.Errorf("look up model %q: %w", name, err)
		}
		return &target{base: model.Base, release: func() {}}, nil
	}
	ref, err := s.adapters.Acquire(name)
	if errors.Is(err, adapters.ErrNotFound) {
		return nil, s.unknownModel(ctx, name)
	}
	if err != nil {
		return nil, fmt.Errorf("look up model %q: %w", name, err)
	}
	model, err := s.models.Get(ctx, ref.BaseModel)
	if err == nil {
		err = ref.CheckBase(model.Digest)
	} else if errors.Is(err, finetune.ErrUnknownModel) {
		err = &wire.Error{Status: http.StatusConflict, Type: wire.ErrorTypeInvalidRequest, Param: new("model"), Code: new("base_model_missing"),
			Message: fmt.Sprintf("the base model %s of %s is not here any more; add it again", ref.BaseModel, name)}
	}
	if err != nil {
		ref.Release() //nolint:contextcheck // what it may remove is removed whether or not the client is there
		return nil, fmt.Errorf("look up the base of %q: %w", name, err)
	}
	adapter := &child.Adapter{ID: ref.ID, Path: ref.GGUF(), SHA256: ref.Files[lora.GGUFFile]}
	return &target{base: model.Base, adapter: adapter, release: ref.Release}, nil
}

// maxNamesShown keeps the message of an unknown model readable.
const maxNamesShown = 5

func (s *Server) unknownModel(ctx context.Context, name string) error {
	var names []string
	if list, err := s.models.List(ctx); err == nil { // only for the message
		for _, m := range list {
			names = append(names, m.Name)
		}
	}
	for _, a := range slices.Backward(s.adapters.List()) {
		names = append(names, a.Name)
	}
	known := "there is none yet: get one with hone pull or hone models add"
	if len(names) > maxNamesShown {
		known = fmt.Sprintf("there are %s and %d more", strings.Join(names[:maxNamesShown], ", "), len(names)-maxNamesShown)
	} else if len(names) > 0 {
		known = "there is " + strings.Join(names, ", ")
	}
	return &wire.Error{Status: http.StatusNotFound, Type: wire.ErrorTypeInvalidRequest, Param: new("model"), Code: new("model_not_found"),
		Message: fmt.Sprintf("the model %q does not exist; %s", name, known)}
}

func (s *Server) listModels(c *gin.Context) error {
	bases, err := s.models.List(c.Request.Context())
	if err != nil {
		return fmt.Errorf("list models: %w", err)
	}
	list := []wire.Model{}
	for _, m := range bases {
		list = append(list, baseToWire(m))
	}
	for _, a := range s.adapters.List() {
		list = append(list, tunedToWire(a))
	}
	return encode(c, http.StatusOK, page(list, false, func(m wire.Model) string { return m.ID }))
}

// modelID is the rest of the path: names may hold / and :.
func modelID(c *gin.Context) string { return strings.TrimPrefix(c.Param("id"), "/") }

func (s *Server) getModel(c *gin.Context) error {
	ctx, id := c.Request.Context(), modelID(c)
	var model wire.Model
	if strings.HasPrefix(id, tunedPrefix) {
		a, err := s.adapters.Lookup(id)
		if errors.Is(err, adapters.ErrNotFound) {
			return s.unknownModel(ctx, id)
		}
		if err != nil {
			return fmt.Errorf("look up model %q: %w", id, err)
		}
		model = tunedToWire(a)
	} else {
		m, err := s.models.Get(ctx, id)
		if errors.Is(err, finetune.ErrUnknownModel) {
			return s.unknownModel(ctx, id)
		}
		if err != nil {
			return fmt.Errorf("look up model %q: %w", id, err)
		}
		model = baseToWire(m)
	}
	return encode(c, http.StatusOK, model)
}

func (s *Server) deleteModel(c *gin.Context) error {
	ctx, id := c.Request.Context(), modelID(c)
	var err error
	if strings.HasPrefix(id, tunedPrefix) {
		err = s.adapters.Delete(ctx, id)
	} else {
		err = s.deleteBase(ctx, id)
	}
	if errors.Is(err, adapters.ErrNotFound) || errors.Is(err, finetune.ErrUnknownModel) {
		return s.unknownModel(ctx, id)
	}
	if err != nil {
		return err
	}
	return encode(c, http.StatusOK, wire.Deleted{ID: id, Object: "model", Deleted: true})
}

// deleteBase removes a base model that no tuned model and no unfinished job needs.
func (s *Server) deleteBase(ctx context.Context, name string) error {
	if _, err := s.models.Get(ctx, name); errors.Is(err, finetune.ErrUnknownModel) {
		return s.unknownModel(ctx, name)
	}
	needed, err := s.jobs.Unfinished(ctx, name)
	if err != nil {
		return fmt.Errorf("jobs of the model %q: %w", name, err)
	}
	for i := range needed {
		needed[i] = "job " + needed[i]
	}
	for _, a := range s.adapters.List() {
		if a.BaseModel == name {
			needed = append(needed, a.Name)
		}
	}
	if len(needed) > 0 {
		return &wire.Error{Status: http.StatusConflict, Type: wire.ErrorTypeInvalidRequest, Param: new("model"), Code: new("model_in_use"),
			Message: fmt.Sprintf("%s is the base model of %s; delete these models and cancel these jobs first", name, strings.Join(needed, ", "))}
	}
	return s.models.Delete(ctx, name)
}

func baseToWire(m BaseModel) wire.Model {
	return wire.Model{ID: m.Name, Object: "model", Created: m.CreatedAt, OwnedBy: "hone", Hone: &wire.ModelDetails{
		Kind: "base", Digest: m.Digest, Architecture: m.Architecture, ContextTokens: m.ContextTokens,
	}}
}

func tunedToWire(a adapters.Adapter) wire.Model {
	details := &wire.ModelDetails{
		Kind: "tuned", Digest: a.BaseDigest, BaseModel: a.BaseModel, JobID: a.JobID, R: a.Rank, LoraAlpha: a.Alpha,
		TargetModules: a.TargetModules, Choices: a.Choices, MaxLength: a.MaxLength,
	}
	if a.QuestionTemplate != "" {
		details.QuestionTemplate = &a.QuestionTemplate
	}
	if a.SystemMessage != "" {
		details.SystemMessage = &a.SystemMessage
	}
	return wire.Model{ID: a.Name, Object: "model", Created: a.CreatedAt, OwnedBy: "user", Parent: a.BaseModel, Hone: details}
}

// page makes a list of data with its first and last ids.
func page[T any](data []T, more bool, id func(T) string) wire.List[T] {
	list := wire.List[T]{Object: "list", Data: data, HasMore: more}
	if len(data) > 0 {
		list.FirstID, list.LastID = new(id(data[0])), new(id(data[len(data)-1]))
	}
	return list
}
