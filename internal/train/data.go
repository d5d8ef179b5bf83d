package train

import (
	"context"
	"errors"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/prompt"
)

func (t *trainer) readData(ctx context.Context, model string, maxLength int) error {
	vocabulary, err := llama.LoadModel(model, llama.ModelOptions{VocabularyOnly: true})
	if err != nil {
		return &child.Error{Code: child.CodeInvalidModel, Message: err.Error(), Param: "model"}
	}
	defer vocabulary.Close()
	builder, err := prompt.Open(t.config.ModelDir, vocabulary.ChatTemplate(), vocabulary)
	if err != nil {
		return &child.Error{Code: child.CodeInvalidModel, Message: err.Error(), Param: "model"}
	}
	defer builder.Close()
	t.template = builder.TemplateDigest()
	options := dataset.Options{MaxLength: maxLength, CacheDir: t.config.CacheDir}
	if t.data, err = dataset.Open(ctx, t.config.TrainingFile, builder, options); err != nil {
		return t.dataFailure(ctx, err, "training_file")
	}
	if t.config.ValidationFile != "" {
		if t.valid, err = dataset.Open(ctx, t.config.ValidationFile, builder, options); err != nil {
			return t.dataFailure(ctx, err, "validation_file")
		}
	}
	return nil
}

func (t *trainer) dataFailure(ctx context.Context, err error, param string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var line *dataset.LineError
	if errors.As(err, &line) || errors.Is(err, dataset.ErrNoRows) {
		// The path inside the data directory says nothing to the user: name the field instead.
		message := strings.ReplaceAll(param, "_", " ") + ": " + err.Error()
		if line != nil {
			message = strings.ReplaceAll(param, "_", " ") + ", " + line.Error()
		}
		return &child.Error{Code: "invalid_" + param, Message: message, Param: param}
	}
	return err
}
