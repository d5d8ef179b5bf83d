package train

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/prompt"
)

// readData opens both files as the plan says.
func (t *trainer) readData(ctx context.Context) error {
	vocabulary, err := llama.LoadModel(t.basePath(), llama.ModelOptions{VocabularyOnly: true})
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
	options := dataset.Options{
		MaxLength: t.plan.MaxLength, Truncate: t.plan.LongRows == "truncate", TrainOnAll: t.plan.TrainOnAll,
		Choices: t.plan.Choices, DPO: t.plan.Method == methodDPO, CacheDir: t.cacheDir(),
	}
	if t.data, err = dataset.Open(ctx, t.config.TrainingFile, builder, options); err != nil {
		return dataFailure(ctx, err, "training_file")
	}
	if t.config.ValidationFile == "" {
		return nil
	}
	if t.valid, err = dataset.Open(ctx, t.config.ValidationFile, builder, options); err != nil {
		return dataFailure(ctx, err, "validation_file")
	}
	return t.readChoices(ctx, builder, options)
}

// readChoices opens the validation file once more, with the answers of both files as choices, if they are so few that
// they look like those of one kind of question: each is there twice on average.
func (t *trainer) readChoices(ctx context.Context, builder *prompt.Builder, o dataset.Options) error {
	if o.DPO || len(o.Choices) > 0 || len(t.data.Answers) < 2 || len(t.valid.Answers) == 0 {
		return nil
	}
	all := slices.Compact(slices.Sorted(slices.Values(slices.Concat(t.data.Answers, t.valid.Answers))))
	if len(all) > t.data.Rows/2 {
		return nil
	}
	o.Choices, o.TrainOnAll = all, false
	choices, err := dataset.Open(ctx, t.config.ValidationFile, builder, o)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var line *dataset.LineError
	switch {
	case errors.As(err, &line), errors.Is(err, dataset.ErrNoRows):
		return nil // answers that cannot be told apart as choices: the accuracy is not reported
	case err != nil:
		return err
	}
	same, err := sameRows(t.valid, choices)
	if err != nil || !same {
		return errors.Join(err, choices.Close())
	}
	t.validChoices = choices
	return nil
}

// sameRows reports whether the examples of choices are those of data: not if some are too long with one of the choices,
// or train several turns.
func sameRows(data, choices *dataset.Dataset) (bool, error) {
	if data.Rows != choices.Rows {
		return false, nil
	}
	for i := range data.Rows {
		row, err := data.Example(i)
		if err != nil {
			return false, err
		}
		choice, err := choices.Example(i)
		if err != nil {
			return false, err
		}
		c := choice.Candidates[choice.Right]
		prompt := max(0, slices.IndexFunc(c.Weights, func(w float32) bool { return w != 0 }))
		if tokens := row.Candidates[0].Tokens; len(tokens) < prompt || !slices.Equal(tokens[:prompt], c.Tokens[:prompt]) {
			return false, nil
		}
	}
	return true, nil
}

func dataFailure(ctx context.Context, err error, param string) error {
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
