package train

import (
	"errors"
	"testing"

	"github.com/hone-llm/hone/internal/child"
)

// Each of these cannot be trained with; the error names the option.
func TestPlanRefuses(t *testing.T) {
	for _, c := range []struct {
		option string
		o      child.TrainOptions
		method string
	}{
		{"r", child.TrainOptions{R: ptr(257)}, ""},
		{"lora_alpha", child.TrainOptions{LoraAlpha: ptr(0.0)}, ""},
		{"lora_dropout", child.TrainOptions{LoraDropout: ptr(1.0)}, ""},
		{"target_modules", child.TrainOptions{TargetModules: []string{"lm_head"}}, ""},
		{"layers_to_transform", child.TrainOptions{LayersToTransform: []int{30}}, ""},
		{"init_lora_weights", child.TrainOptions{InitLoraWeights: ptr("pissa")}, ""},
		{"learning_rate", child.TrainOptions{LearningRate: ptr(0.0)}, ""},
		{"learning_rate", child.TrainOptions{LearningRate: ptr(1e-4), LearningRateMultiplier: ptr(2.0)}, ""},
		{"batch_size", child.TrainOptions{BatchSize: ptr(0)}, ""},
		{"batch_size", child.TrainOptions{BatchSize: ptr(8), PerDeviceBatchSize: ptr(2), GradientAccumulation: ptr(2)}, ""},
		{"gradient_accumulation_steps", child.TrainOptions{BatchSize: ptr(8), GradientAccumulation: ptr(2)}, ""},
		{"num_train_epochs", child.TrainOptions{NumTrainEpochs: ptr(0)}, ""},
		{"warmup_ratio", child.TrainOptions{WarmupRatio: ptr(1.5)}, ""},
		{"warmup_steps", child.TrainOptions{WarmupSteps: ptr(-1)}, ""},
		{"lr_scheduler_type", child.TrainOptions{LRSchedulerType: ptr("polynomial")}, ""},
		{"lr_scheduler_kwargs", child.TrainOptions{LRSchedulerType: ptr("cosine_with_min_lr")}, ""},
		{"lr_scheduler_kwargs", child.TrainOptions{LRSchedulerKwargs: &child.MinimumRate{MinLR: ptr(1e-5)}}, ""},
		{"lr_scheduler_kwargs", child.TrainOptions{LRSchedulerType: ptr("cosine_with_min_lr"), LRSchedulerKwargs: &child.MinimumRate{MinLRRate: ptr(2.0)}}, ""},
		{"max_grad_norm", child.TrainOptions{MaxGradNorm: ptr(-1.0)}, ""},
		{"long_rows", child.TrainOptions{LongRows: ptr("cut")}, ""},
		{"choices", child.TrainOptions{Choices: []string{"A"}}, ""},
		{"choices", child.TrainOptions{Choices: []string{"A", "B", "A"}}, ""},
		{"choices", child.TrainOptions{Choices: []string{"A", " B"}}, ""},
		{"train_on_all", child.TrainOptions{Choices: []string{"A", "B"}, TrainOnAll: ptr(true)}, ""},
		{"train_on_all", child.TrainOptions{TrainOnAll: ptr(true)}, "dpo"},
		{"save_minutes", child.TrainOptions{SaveMinutes: ptr(-1.0)}, ""},
		{"device", child.TrainOptions{Device: ptr("tpu")}, ""},
		{"memory", child.TrainOptions{Memory: ptr("tiny")}, ""},
		{"micro_batch_tokens", child.TrainOptions{MicroBatchTokens: ptr(1)}, ""},
		{"choices", child.TrainOptions{Choices: []string{"A", "B"}}, "dpo"},
		{"beta", child.TrainOptions{Beta: ptr(0.1)}, ""},
		{"beta", child.TrainOptions{Beta: ptr(0.0)}, "dpo"},
		{"loss_type", child.TrainOptions{LossType: ptr("hinge")}, "dpo"},
		{"label_smoothing", child.TrainOptions{LabelSmoothing: ptr(0.5)}, "dpo"},
		{"eval_strategy", child.TrainOptions{EvalStrategy: ptr("epoch")}, ""},
		{"save_strategy", child.TrainOptions{SaveStrategy: ptr("best")}, ""},
		{"save_steps", child.TrainOptions{SaveSteps: ptr(5)}, ""},
		{"save_steps", child.TrainOptions{SaveStrategy: ptr("steps")}, ""},
		{"save_total_limit", child.TrainOptions{SaveTotalLimit: ptr(0)}, ""},
		{"logging_steps", child.TrainOptions{LoggingSteps: ptr(0)}, ""},
		{"load_best_model_at_end", child.TrainOptions{LoadBestModelAtEnd: ptr(true)}, ""},
		{"metric_for_best_model", child.TrainOptions{MetricForBestModel: ptr("choice_accuracy")}, ""},
		{"early_stopping_patience", child.TrainOptions{EarlyStoppingPatience: ptr(2)}, ""},
	} {
		_, err := NewPlan(c.o, facts{Rows: 100, Weights: 135e6, MaxLength: 2048, Layers: 30, Method: c.method})
		var option *OptionError
		if !errors.As(err, &option) || option.Option != c.option {
			t.Errorf("%+v: error %v, want one of %s", c.o, err, c.option)
		}
	}
}

func TestPlanReadsBatchSizes(t *testing.T) {
	for _, c := range []struct {
		o    child.TrainOptions
		want int
	}{
		{child.TrainOptions{BatchSize: ptr(6)}, 6},
		{child.TrainOptions{PerDeviceBatchSize: ptr(2), GradientAccumulation: ptr(4)}, 8},
		{child.TrainOptions{PerDeviceBatchSize: ptr(2)}, 2},
		{child.TrainOptions{GradientAccumulation: ptr(3)}, 9}, // of the automatic 3
		{child.TrainOptions{BatchSize: ptr(8), PerDeviceBatchSize: ptr(2), GradientAccumulation: ptr(4)}, 8},
	} {
		p, err := NewPlan(c.o, facts{Rows: 100, Weights: 135e6, MaxLength: 2048, Layers: 30})
		if err != nil || p.BatchSize != c.want {
			t.Errorf("%+v: batch size %d, %v; want %d", c.o, p.BatchSize, err, c.want)
		}
	}
}

// What the automatic values come to, from twenty rows to two hundred thousand.
func TestPlanIsSensibleAtEverySize(t *testing.T) {
	for _, c := range []struct{ rows, weights, epochs, batch, steps int }{
		{20, 135e6, 10, 1, 200},
		{100, 135e6, 10, 3, 340},
		{500, 135e6, 3, 4, 375},
		{5_000, 135e6, 1, 4, 1250},
		{200_000, 135e6, 1, 4, 50_000},
		{20, 8e9, 10, 1, 200},
		{500, 8e9, 3, 8, 189},
		{200_000, 8e9, 1, 8, 25_000},
	} {
		p, err := NewPlan(child.TrainOptions{}, facts{Rows: c.rows, Weights: c.weights, MaxLength: 2048, Layers: 30})
		if err != nil || p.NumTrainEpochs != c.epochs || p.BatchSize != c.batch || p.TotalSteps != c.steps {
			t.Errorf("%d rows, %d weights: %d epochs, batch %d, %d steps, %v; want %+v", c.rows, c.weights, p.NumTrainEpochs, p.BatchSize, p.TotalSteps, err, c)
		}
	}
}

// Evaluations and checkpoints must meet for the best model to be loaded, and auto makes them.
func TestPlanLoadsTheBestModel(t *testing.T) {
	f := facts{Rows: 100, Weights: 135e6, MaxLength: 2048, Layers: 30, Valid: true}
	p, err := NewPlan(child.TrainOptions{LoadBestModelAtEnd: ptr(true), EvalStrategy: ptr("steps"), EvalSteps: ptr(5)}, f)
	if err != nil || p.SaveStrategy != "steps" || p.SaveSteps != 5 {
		t.Errorf("%s every %d steps, %v; expected steps, 5", p.SaveStrategy, p.SaveSteps, err)
	}
	for _, o := range []child.TrainOptions{
		{SaveStrategy: ptr("no")},
		{SaveStrategy: ptr("steps"), SaveSteps: ptr(5)},
		{EvalStrategy: ptr("steps"), EvalSteps: ptr(4), SaveStrategy: ptr("steps"), SaveSteps: ptr(6)},
	} {
		o.LoadBestModelAtEnd = ptr(true)
		var option *OptionError
		if _, err := NewPlan(o, f); !errors.As(err, &option) || option.Option != "save_strategy" {
			t.Errorf("%+v: error %v, want one of save_strategy", o, err)
		}
	}
}

// An adapter to continue from decides its own shape.
func TestPlanContinues(t *testing.T) {
	start := &child.TrainPlan{R: 8, LoraAlpha: 16, TargetModules: []string{"q_proj", "v_proj"}}
	f := facts{Rows: 100, Weights: 135e6, MaxLength: 2048, Layers: 30, Start: start}
	p, err := NewPlan(child.TrainOptions{R: ptr(8), TargetModules: []string{"v_proj", "q_proj"}}, f)
	if err != nil || p.R != 8 || p.LoraAlpha != 16 || len(p.TargetModules) != 2 {
		t.Errorf("%+v, %v", p, err)
	}
	for name, o := range map[string]child.TrainOptions{
		"r": {R: ptr(16)}, "lora_alpha": {LoraAlpha: ptr(8.0)}, "use_rslora": {UseRSLoRA: ptr(true)},
		"target_modules": {TargetModules: []string{"all-linear"}}, "layers_to_transform": {LayersToTransform: []int{1}},
		"init_lora_weights": {InitLoraWeights: ptr("gaussian")},
	} {
		var option *OptionError
		if _, err := NewPlan(o, f); !errors.As(err, &option) || option.Option != name {
			t.Errorf("%s: error %v", name, err)
		}
	}
}
