package train

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/modeltest"
	"github.com/hone-llm/hone/internal/prompt"
)

// golden is what scripts/golden/train_golden.py writes; its head explains every field.
type golden struct {
	R                 int         `json:"r"`
	LoraAlpha         float64     `json:"lora_alpha"`
	UseRSLoRA         bool        `json:"use_rslora"`
	TargetModules     []string    `json:"target_modules"`
	LayersToTransform []int       `json:"layers_to_transform"`
	Rows              []goldenRow `json:"rows"`
	Gradient          struct {
		Rows   []int   `json:"rows"`
		BBound float64 `json:"b_bound"`
		Loss   float64 `json:"loss"`
		Norm   float64 `json:"norm"`
	} `json:"gradient"`
	Curve struct {
		BBound      float64    `json:"b_bound"`
		LR          float64    `json:"lr"`
		WarmupSteps int        `json:"warmup_steps"`
		Scheduler   string     `json:"lr_scheduler_type"`
		MinLRRate   float64    `json:"min_lr_rate"`
		Betas       [2]float64 `json:"betas"`
		Eps         float64    `json:"eps"`
		WeightDecay float64    `json:"weight_decay"`
		MaxGradNorm float64    `json:"max_grad_norm"`
		Batches     [][]int    `json:"batches"`
		Steps       []struct {
			Loss         float64 `json:"loss"`
			GradNorm     float64 `json:"grad_norm"`
			LearningRate float64 `json:"learning_rate"`
		} `json:"steps"`
	} `json:"curve"`
	Full map[string]float64 `json:"full"`

	tensors map[string]gguf.Float32Tensor
}

type goldenRow struct {
	Tokens  []engine.Token `json:"tokens"`
	Weights []float32      `json:"weights"`
}

func (r goldenRow) row() prompt.Row { return prompt.Row{Tokens: r.Tokens, Weights: r.Weights} }

func readGolden(t *testing.T, name string) *golden {
	t.Helper()
	g := new(golden)
	g.tensors = readGoldenFiles(t, name, g)
	if g.Curve.Scheduler == "" {
		g.Curve.Scheduler = "cosine"
	}
	return g
}

// readGoldenFiles decodes NAME.golden.json into values and returns the tensors of NAME.golden.safetensors.
func readGoldenFiles(t *testing.T, name string, values any) map[string]gguf.Float32Tensor {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name+".golden.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, values); err != nil {
		t.Fatal(err)
	}
	list, _, err := gguf.ReadSafetensors(filepath.Join("testdata", name+".golden.safetensors"))
	if err != nil {
		t.Fatal(err)
	}
	tensors := make(map[string]gguf.Float32Tensor)
	for _, tensor := range list {
		tensors[tensor.Name] = tensor
	}
	return tensors
}

// batch packs rows of the golden file; it also returns the sum of their target weights.
func (g *golden) batch(rows []int) (engine.Batch, float64) {
	b, total := engine.Batch{}, 0.0
	for _, r := range rows {
		row := g.Rows[r]
		start := len(b.Tokens)
		for i, w := range row.Weights {
			if w != 0 {
				b.Targets = append(b.Targets, engine.Target{Position: start + i - 1, Label: row.Tokens[i], Weight: w})
				total += float64(w)
			}
		}
		b.Tokens = append(b.Tokens, row.Tokens...)
		b.Segments = append(b.Segments, engine.Segment{Start: start, End: len(b.Tokens), Parent: -1})
	}
	return b, total
}

// splitmix64 is the generator of scripts/golden/lora.py.
func splitmix64(seed, tensor uint64, element int) uint64 {
	z := seed<<48 + tensor<<32 + uint64(element) + 0x9E3779B97F4A7C15
	z = (z ^ z>>30) * 0xBF58476D1CE4E5B9
	z = (z ^ z>>27) * 0x94D049BB133111EB
	return z ^ z>>31
}

func goldenUniform(tensor uint64, n int, bound float64) []float32 {
	values := make([]float32, n)
	for i := range values {
		values[i] = float32((2*float64(splitmix64(1, tensor, i)>>11)/(1<<53) - 1) * bound)
	}
	return values
}

func TestGoldenGenerator(t *testing.T) {
	if a, b := splitmix64(1, 0, 0), splitmix64(1, 0, 1); a != 11711021152883586896 || b != 62654667206561001 {
		t.Fatalf("splitmix64 = %d, %d", a, b)
	}
}

// permuteRows maps rows of a [rows, columns] matrix between Hugging Face's and GGUF's order of rotary heads:
// row h*d + 2j + s of the file is row h*d + s*d/2 + j of Hugging Face.
func permuteRows(values []float32, columns, headSize int, toFile bool) []float32 {
	out := make([]float32, len(values))
	for row := range len(values) / columns {
		h, i := row/headSize, row%headSize
		hf := h*headSize + (i%2)*headSize/2 + i/2
		from, to := hf, row
		if !toFile {
			from, to = row, hf
		}
		copy(out[to*columns:(to+1)*columns], values[from*columns:(from+1)*columns])
	}
	return out
}

// adapter is a model with an adapter of golden values.
type adapter struct {
	backend  *ggml.Backend
	model    *graph.Model
	lora     *graph.LoRA
	permuted bool // the file's rows of q and k are in GGUF's order of rotary heads: Llama's are
}

func loadAdapter(t *testing.T, path string, layout graph.Layout, threads int, o graph.LoRAOptions) adapter {
	t.Helper()
	backend, model := loadModel(t, path, layout, threads)
	weights, err := model.NewLoRA(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(weights.Close)
	return adapter{backend, model, weights, architectureOf(t, path) == "llama"}
}

func architectureOf(t *testing.T, path string) string {
	t.Helper()
	file, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	name, _ := file.Metadata.String("general.architecture")
	return name
}

func (a adapter) rotary(m graph.Module) bool {
	return a.permuted && (m == graph.Query || m == graph.Key)
}

// number and tensorName are those of scripts/golden/lora.py for the half A (0) or B (1) of a part.
func number(p graph.Part, half int) uint64 { return uint64(p.Layer*7+int(p.Module))*2 + uint64(half) }

func tensorName(p graph.Part, half int) string {
	block := "mlp"
	if p.Module <= graph.Output {
		block = "self_attn"
	}
	return fmt.Sprintf("layers.%d.%s.%s.lora_%c", p.Layer, block, p.Module, 'A'+half)
}

// initialise sets the golden values; those of B are within bBound.
func (a adapter) initialise(bBound float64) {
	r := a.lora.Rank
	for _, p := range a.lora.Parts {
		down := goldenUniform(number(p, 0), r*p.In, 1/math.Sqrt(float64(p.In)))
		up := goldenUniform(number(p, 1), r*p.Out, bBound)
		if a.rotary(p.Module) {
			up = permuteRows(up, r, a.model.Heads.Size, true)
		}
		a.lora.SetMatrices(p, down, up)
	}
}

// eachGradient calls visit with every gradient tensor, its rows in Hugging Face's order.
func (a adapter) eachGradient(visit func(p graph.Part, half int, got []float32)) {
	for _, p := range a.lora.Parts {
		down, up := a.lora.Matrices(a.lora.Gradients, p)
		if a.rotary(p.Module) {
			up = permuteRows(up, a.lora.Rank, a.model.Heads.Size, false)
		}
		visit(p, 0, down)
		visit(p, 1, up)
	}
}

type goldenRun struct {
	*golden
	adapter
}

func loadGolden(t *testing.T, g *golden, path string, layout graph.Layout, threads int) *goldenRun {
	t.Helper()
	modules := graph.AllLinear
	if len(g.TargetModules) > 0 {
		modules = nil
		for _, name := range g.TargetModules {
			m, err := graph.ParseModule(name)
			if err != nil {
				t.Fatal(err)
			}
			modules = append(modules, m)
		}
	}
	options := graph.LoRAOptions{Rank: g.R, Alpha: g.LoraAlpha, RankScale: g.UseRSLoRA, Modules: modules, Layers: g.LayersToTransform}
	return &goldenRun{g, loadAdapter(t, path, layout, threads, options)}
}

// sketch is the projection of lora.py on 64 random sign vectors.
func sketch(tensor uint64, values []float32) [64]float64 {
	var out [64]float64
	for i, v := range values {
		bits := splitmix64(2, tensor, i)
		for k := range out {
			if bits>>k&1 == 1 {
				out[k] += float64(v)
			} else {
				out[k] -= float64(v)
			}
		}
	}
	return out
}

// gradientErrors returns the relative error of every LoRA gradient tensor: exact where the golden file holds the
// whole tensor, else estimated from its sketch.
func (r *goldenRun) gradientErrors(t *testing.T) (names []string, errors []float64) {
	t.Helper()
	r.initialise(r.Gradient.BBound)
	batch, weight := r.batch(r.Gradient.Rows)
	clear(r.lora.Gradients)
	result, err := r.model.Gradients(batch, r.lora, float32(1/weight))
	if err != nil {
		t.Fatal(err)
	}
	loss := 0.0
	for i, l := range result.Losses {
		loss += float64(l) * float64(batch.Targets[i].Weight) / weight
	}
	if math.Abs(loss/r.Gradient.Loss-1) > 0.01 {
		t.Errorf("loss of the gradient batch: got %.6f, PyTorch has %.6f", loss, r.Gradient.Loss)
	}
	norms, sketches := r.tensors["grad_norm"].Data, r.tensors["grad_sketch"].Data
	r.eachGradient(func(p graph.Part, half int, got []float32) {
		name, tensor := tensorName(p, half), number(p, half)
		var sum float64
		if full, ok := r.tensors["grad."+name]; ok {
			for i, v := range full.Data {
				d := float64(got[i]) - float64(v)*r.Full[name]
				sum += d * d
			}
		} else {
			for k, v := range sketch(tensor, got) {
				d := v - float64(sketches[int(tensor)*64+k])
				sum += d * d / 64
			}
		}
		names, errors = append(names, name), append(errors, math.Sqrt(sum)/float64(norms[tensor]))
	})
	return names, errors
}

// attempt is a trainer over an adapter of golden values.
type attempt struct {
	*trainer
	events *bytes.Buffer
}

func (a adapter) attempt(t *testing.T, plan child.TrainPlan, examples []dataset.Example) attempt {
	t.Helper()
	data, err := dataset.New(examples...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { data.Close() })
	events := new(bytes.Buffer)
	return attempt{&trainer{
		config: child.TrainerConfig{CacheDir: t.TempDir()}, plan: plan, data: data, objective: supervised{},
		backend: a.backend, model: a.model, lora: a.lora, moments: newMoments(len(a.lora.Parameters)),
		compute:  func(m dataset.Micro) (engine.Result, error) { return a.model.Gradients(m.Batch, a.lora, 1) },
		reporter: reporter{encoder: json.NewEncoder(events)},
	}, events}
}

// optimize does one of the trainer's own steps.
func (a attempt) optimize(t *testing.T, examples []dataset.Example, microTokens int, schedule Schedule) child.TrainerEvent {
	t.Helper()
	a.events.Reset()
	if err := a.trainer.optimize(t.Context(), a.pack(examples, 0, microTokens), schedule); err != nil {
		t.Fatal(err)
	}
	var step child.TrainerEvent
	if err := json.NewDecoder(a.events).Decode(&step); err != nil || step.Type != child.EventStep {
		t.Fatalf("event %+v, %v: expected a step", step, err)
	}
	return step
}

// curveError runs the trainer's own steps over the golden batches and returns the largest relative difference of their
// losses from PyTorch's.
func (r *goldenRun) curveError(t *testing.T) float64 {
	t.Helper()
	c := r.Curve
	r.initialise(c.BBound)
	var examples []dataset.Example
	for i, row := range r.Rows {
		examples = append(examples, dataset.Example{Row: i, Candidates: []prompt.Row{row.row()}, Tokens: len(row.Tokens)})
	}
	attempt := r.attempt(t, child.TrainPlan{
		NumTrainEpochs: 1, BatchSize: len(c.Batches[0]), TotalSteps: len(c.Steps), MaxGradNorm: c.MaxGradNorm,
		AdamBeta1: c.Betas[0], AdamBeta2: c.Betas[1], AdamEpsilon: c.Eps, WeightDecay: c.WeightDecay,
	}, examples)
	schedule := Schedule{Kind: c.Scheduler, Peak: c.LR, Minimum: c.MinLRRate * c.LR, Warmup: c.WarmupSteps, Total: len(c.Steps)}
	worst := 0.0
	for i, rows := range c.Batches {
		var batch []dataset.Example
		for _, row := range rows {
			batch = append(batch, examples[row])
		}
		step := attempt.optimize(t, batch, defaultMicroTokens, schedule)
		want := c.Steps[i]
		if math.Abs(step.LearningRate-want.LearningRate) > 1e-9 {
			t.Errorf("step %d: learning rate %g, PyTorch has %g", i, step.LearningRate, want.LearningRate)
		}
		difference := math.Abs(step.TrainLoss/want.Loss - 1)
		t.Logf("step %2d: loss %.5f, PyTorch %.5f (%.3f%%); gradient norm %.4f, PyTorch %.4f", i, step.TrainLoss, want.Loss, 100*difference, step.GradNorm, want.GradNorm)
		worst = max(worst, difference)
	}
	return worst
}

// tinyModels are those of scripts/golden/tiny_models.py, with what is in them.
var tinyModels = []struct{ name, what string }{
	{"tiny-llama-q4_1", "Llama: Q4_1, head Q8_0 (tied)"},
	{"tiny-llama-q8_0", "Llama: Q8_0"},
	{"tiny-llama3", "Llama 3's rope: layers as Q4_K_M (Q4_K, Q6_K) and Q5_K_M (Q5_K, Q6_K), head Q6_K; weight decay"},
	{"tiny-mistral", "Mistral, linear rope: Q4_0, Q5_0, Q5_1; q and v, constant rate"},
	{"tiny-qwen2", "Qwen 2: Q5_0, IQ4_NL, Q5_1, Q8_0, head IQ4_NL (tied); rsLoRA of rank 5, linear rate"},
	{"tiny-qwen3", "Qwen 3: F16, BF16, F32, Q4_0, head BF16 (tied); layers 0 and 2, cosine to a minimum"},
	{"tiny-qwen3-q4_k_m", "Qwen 3: Q4_K_M, head Q6_K (tied)"},
}

// float32s is the layout that rounds nothing, and rounding bounds what it leaves: other orders of float32 sums, or the
// products of a device, which may be TensorFloat-32's.
var float32s = graph.Layout{Forward: ggml.F32, Backward: ggml.F32}

func rounding() float64 {
	if gpuLibraries != "" {
		return 0.01
	}
	return 3e-5
}

// TestGolden compares gradients and the first 20 steps with transformers + PEFT in float32 over the dequantised
// weights. The bounds are the product's promise (3% a tensor, 1% a loss); float32 weights show that what remains in
// other layouts is rounding, and are held to much less.
func TestGolden(t *testing.T) {
	type bound struct {
		layout         graph.Layout
		gradient, loss float64
	}
	// No plan of a CPU has BF16 weights in both passes; they show what rounding to 8 bits does.
	tiny := []bound{{float32s, rounding(), rounding()}, {graph.DeviceLayout(), 0.03, 0.01}, {graph.DeviceStoredLayout(), 0.03, 0.01}}
	whole := []bound{{graph.DeviceLayout(), 0.03, 0.01}, {graph.DeviceStoredLayout(), 0.03, 0.01}}
	if gpuLibraries == "" {
		tiny = []bound{{float32s, rounding(), rounding()}, {graph.Layout{Forward: ggml.BF16, Backward: ggml.BF16}, 0.06, 0.01}, {graph.Layout{Forward: ggml.F32, Backward: ggml.BF16}, 0.03, 0.01}}
		if ggml.HasVNNI() {
			tiny = append(tiny, bound{graph.Layout{Forward: graph.Packed, Backward: graph.Packed}, 0.03, 0.01}, bound{graph.Layout{Forward: graph.Stored, Backward: graph.Stored}, 0.03, 0.01})
		}
		whole = []bound{{graph.ExactLayout(), 0.03, 0.01}}
	}
	type run struct {
		bound
		golden, path, what string
		threads            int
	}
	var tests []run
	for _, m := range tinyModels {
		for _, b := range tiny {
			tests = append(tests, run{b, m.name, "testdata/" + m.name + ".gguf", m.what, 1})
		}
	}
	for _, b := range whole {
		tests = append(tests, run{b, "smollm2", modeltest.Path(t), "the default model", 2})
	}
	for _, test := range tests {
		t.Run(test.golden+"/"+strings.ReplaceAll(test.layout.String(), "/", "-"), func(t *testing.T) {
			run := loadGolden(t, readGolden(t, test.golden), test.path, test.layout, test.threads)
			names, errors := run.gradientErrors(t)
			worst, where, sum := 0.0, "", 0.0
			for i, e := range errors {
				sum += e
				if e > worst || math.IsNaN(e) {
					worst, where = e, names[i]
				}
				if !(e <= test.gradient) {
					t.Errorf("gradient of %s: relative error %.3g", names[i], e)
				}
			}
			t.Logf("%s: gradients of %d tensors: relative error at most %.3g (%s), mean %.3g", test.what, len(errors), worst, where, sum/float64(len(errors)))
			curve := run.curveError(t)
			if !(curve <= test.loss) {
				t.Errorf("losses of the first steps differ by up to %.3g", curve)
			}
			t.Logf("losses of %d steps within %.3g", len(run.Curve.Steps), curve)
		})
	}
}

// Two layouts in turns in one process compute what each computes alone, to the bit: a device that replays recorded graphs
// may not take one's for the other's, whose nodes have the same shapes, and the same addresses once one is closed.
func TestLayoutsInTurns(t *testing.T) {
	layouts := []graph.Layout{graph.DeviceLayout(), graph.DeviceStoredLayout(), {Forward: ggml.F32, Backward: ggml.F32}}
	if gpuLibraries == "" {
		layouts = []graph.Layout{graph.ExactLayout(), {Forward: graph.Stored, Backward: graph.Stored}, {Forward: ggml.F32, Backward: ggml.F32}}
	}
	const path, repeats = "testdata/tiny-llama-q8_0.gguf", 8 // graphs are recorded and replayed after the first few
	options := graph.LoRAOptions{Rank: 8, Alpha: 8, Dropout: 0.05, Modules: graph.AllLinear}
	gradients := func(t *testing.T, a adapter) []float32 {
		b := randomBatch(a.model.Vocabulary, 20, 12, 9)
		clear(a.lora.Gradients)
		if _, err := a.model.Gradients(b, a.lora, 1); err != nil {
			t.Fatal(err)
		}
		return slices.Clone(a.lora.Gradients)
	}
	var alone [][]float32
	for _, layout := range layouts { // one after the other, each closed before the next
		t.Run(strings.ReplaceAll(layout.String(), "/", "-"), func(t *testing.T) {
			a := loadAdapter(t, path, layout, 1, options)
			a.initialise(0.1)
			first := gradients(t, a)
			for range repeats {
				if !slices.Equal(gradients(t, a), first) {
					t.Error("the same micro-batch, other gradients")
				}
			}
			alone = append(alone, first)
		})
	}
	var all []adapter
	for _, layout := range layouts {
		a := loadAdapter(t, path, layout, 1, options)
		a.initialise(0.1)
		all = append(all, a)
	}
	for range repeats {
		for i, a := range all {
			if !slices.Equal(gradients(t, a), alone[i]) {
				t.Errorf("%s: other gradients in turns with the other layouts than alone", layouts[i])
			}
		}
	}
}

// Logits with and without an adapter are transformers', and those that llama.cpp serves are, up to its rounding of
// activations to 8 bits: names, keys, the order of rotary rows, biases, norms and scaled frequencies of every
// architecture are read as they were meant, and an exported adapter means there what it means in PEFT.
func TestGoldenLogits(t *testing.T) {
	if gpuLibraries != "" {
		t.Skip("the engine that serves would find the GPU, too: the trainer has a process of its own")
	}
	for _, m := range tinyModels {
		t.Run(m.name, func(t *testing.T) {
			path := "testdata/" + m.name + ".gguf"
			run := loadGolden(t, readGolden(t, m.name), path, float32s, 1)
			run.initialise(run.Gradient.BBound)
			served, err := llama.LoadModel(path, llama.ModelOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer served.Close()
			exported, err := llama.LoadAdapter(served, filepath.Join(run.export(t, path), lora.GGUFFile))
			if err != nil {
				t.Fatal(err)
			}
			defer exported.Free()
			var trainer, engines [2]float64
			for i, r := range run.Gradient.Rows {
				tokens := run.Rows[r].Tokens
				b := engine.Batch{Tokens: tokens, Segments: engine.Rows(len(tokens)), Targets: []engine.Target{{Position: len(tokens) - 1, Weight: 1}}}
				for j, name := range []string{"base_logits", "logits"} {
					want := run.tensors[name].Data[i*run.model.Vocabulary : (i+1)*run.model.Vocabulary]
					trained, adapter := run.lora, exported
					if j == 0 {
						trained, adapter = nil, nil
					}
					trainer[j] = max(trainer[j], distance(trainerLogits(t, run.model, b, trained), want))
					engines[j] = max(engines[j], distance(servedLogits(t, served, adapter, tokens), want))
				}
			}
			t.Logf("%s: relative error of a row of logits at most %.3g, with the adapter %.3g; as served %.3g, with the adapter %.3g",
				m.what, trainer[0], trainer[1], engines[0], engines[1])
			if !(max(trainer[0], trainer[1]) < rounding()) {
				t.Error("logits are not transformers'")
			}
			if !(engines[0] < 0.1 && engines[1] < 1.5*engines[0]+0.02) {
				t.Error("served logits are not transformers'")
			}
		})
	}
}

// export writes the adapter as a finished job does and returns its directory.
func (r *goldenRun) export(t *testing.T, base string) string {
	t.Helper()
	w := lora.Weights{
		Manifest: lora.Manifest{
			ID: "golden", Name: "ft:base:local::golden", BaseModel: "base", BaseDigest: strings.Repeat("0a", 32), JobID: "ftjob-golden",
			Rank: r.R, Alpha: r.LoraAlpha, MaxLength: 100,
		},
		Architecture: architectureOf(t, base), UseRSLoRA: r.UseRSLoRA, Heads: r.model.Heads.Query, KVHeads: r.model.Heads.KeyValue,
		LayersToTransform: r.LayersToTransform,
	}
	for _, p := range r.lora.Parts {
		a, b := r.lora.Matrices(r.lora.Parameters, p)
		w.Modules = append(w.Modules, lora.Module{Layer: p.Layer, Name: p.Module.String(), In: p.In, Out: p.Out, A: a, B: b})
	}
	dir := filepath.Join(t.TempDir(), "adapter")
	if err := lora.Export(dir, w); err != nil {
		t.Fatal(err)
	}
	return dir
}

// loadModel loads a model file in the layout; both are closed when the test ends, after what was made from them.
func loadModel(t testing.TB, path string, layout graph.Layout, threads int) (*ggml.Backend, *graph.Model) {
	t.Helper()
	backend, err := openBackend(threads)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	file, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	model, err := graph.Load(file, backend, layout)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(model.Close)
	return backend, model
}

// gpuLibraries is the directory of libggml-cuda.so: the tests that compare with PyTorch run on the GPU if it is set.
var gpuLibraries = os.Getenv("HONE_TEST_GPU")

func openBackend(threads int) (*ggml.Backend, error) {
	if gpuLibraries != "" {
		return ggml.OpenGPU(gpuLibraries)
	}
	return ggml.NewCPU(threads)
}
