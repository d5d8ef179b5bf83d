package graph

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// servedMatrix is frozen weights in the form that serving multiplies: one module's, or several stacked ones'.
type servedMatrix struct {
	in, out int
	form    form
	t       ggml.Tensor // I8
}

// form is how weights are multiplied: ggml.Packed, or a layout of ggml.Repacked.
type form struct {
	packed   bool
	repacked ggml.Repacked
}

type servedLayer struct {
	attentionNorm, feedForwardNorm ggml.Tensor
	qkv                            []servedMatrix // stacked, or three
	output                         servedMatrix
	gateUp                         []servedMatrix // stacked, or two
	down                           servedMatrix
	bias                           ggml.Tensor // of q, k and v, or none
	gamma                          ggml.Tensor // of the heads of q, then of k, or none
	cache                          ggml.Tensor // of keys and values
	pages                          []byte
}

// describeWeights lays out the weights and collects what fills them.
func (s *Server) describeWeights() error {
	shape := s.shape
	s.weights = ggml.NewContext(shape.Layers*16+8, 0)
	var errs []error
	tensor := func(name string, sizes ...int64) gguf.Tensor {
		t, ok := s.file.Tensor(name)
		if ok && len(t.Shape) == len(sizes) {
			for i := range sizes {
				ok = ok && t.Shape[i] == sizes[i]
			}
		} else {
			ok = false
		}
		if !ok {
			errs = append(errs, &UnsupportedError{name, fmt.Sprintf("expected a tensor of shape %v", sizes)})
		}
		return t
	}
	vector := func(n int, names ...string) ggml.Tensor {
		to := s.weights.New(ggml.F32, n*len(names))
		at := 0
		for _, name := range names {
			t := tensor(name, int64(n))
			if t.Type != gguf.F32 {
				errs = append(errs, &UnsupportedError{name, fmt.Sprintf("is %s, expected f32", t.Type)})
			}
			offset := at
			s.fills = append(s.fills, func() { copy(to.Floats()[offset:], floatsOf(s.file.Data(t))) })
			at += n
		}
		return to
	}
	// matrices are one for each run of modules that can be stacked: here all or none.
	matrices := func(in int, names []string, outs []int) []servedMatrix {
		sources := make([]gguf.Tensor, len(names))
		total, same := 0, true
		for i, name := range names {
			sources[i] = tensor(name, int64(in), int64(outs[i]))
			total += outs[i]
			same = same && formOf(sources[i].Type, in) == formOf(sources[0].Type, in)
		}
		if len(errs) > 0 {
			return make([]servedMatrix, len(names))
		}
		if same {
			m := s.matrix(formOf(sources[0].Type, in), in, total)
			row := 0
			for i, source := range sources {
				s.fill(m, source, row)
				row += outs[i]
			}
			return []servedMatrix{m}
		}
		var list []servedMatrix
		for i, source := range sources {
			m := s.matrix(formOf(source.Type, in), in, outs[i])
			s.fill(m, source, 0)
			list = append(list, m)
		}
		return list
	}
	s.embedding = tensor("token_embd.weight", int64(shape.Embedding), int64(shape.Vocabulary))
	if !ggml.Dequantizable(ggml.Type(s.embedding.Type)) {
		errs = append(errs, &UnsupportedError{"token_embd.weight", fmt.Sprintf("type %s cannot be expanded", s.embedding.Type)})
	}
	s.norm = vector(shape.Embedding, "output_norm.weight")
	if _, ok := s.file.Tensor("rope_freqs.weight"); ok {
		s.ropeFactors = vector(shape.RopeDimensions/2, "rope_freqs.weight")
	}
	d, q, kv := shape.Embedding, shape.Heads.Query*shape.Heads.Size, shape.Heads.KeyValue*shape.Heads.Size
	s.layers = make([]servedLayer, shape.Layers)
	for i := range s.layers {
		l := &s.layers[i]
		name := func(m Module, suffix string) string { return fmt.Sprintf("blk.%d.%s%s", i, m.TensorName(), suffix) }
		weights := func(modules ...Module) []servedMatrix {
			var names []string
			var outs []int
			in := 0
			for _, m := range modules {
				var out int
				in, out = shape.moduleSize(m)
				names, outs = append(names, name(m, ".weight")), append(outs, out)
			}
			return matrices(in, names, outs)
		}
		l.attentionNorm = vector(d, fmt.Sprintf("blk.%d.attn_norm.weight", i))
		l.qkv = weights(Query, Key, Value)
		if shape.architecture.bias {
			l.bias = s.weights.New(ggml.F32, q+2*kv)
			at := 0
			for _, part := range []struct {
				m Module
				n int
			}{{Query, q}, {Key, kv}, {Value, kv}} {
				t, offset := tensor(name(part.m, ".bias"), int64(part.n)), at
				bias := l.bias
				s.fills = append(s.fills, func() { copy(bias.Floats()[offset:], floatsOf(s.file.Data(t))) })
				at += part.n
			}
		}
		if shape.architecture.headNorm {
			l.gamma = vector(shape.Heads.Size, name(Query, "_norm.weight"), name(Key, "_norm.weight"))
		}
		l.output = weights(Output)[0]
		l.feedForwardNorm = vector(d, fmt.Sprintf("blk.%d.ffn_norm.weight", i))
		l.gateUp = weights(Gate, Up)
		l.down = weights(Down)[0]
	}
	head := "output.weight"
	if shape.TiedHead {
		head = "token_embd.weight"
	}
	s.head = matrices(d, []string{head}, []int{shape.Vocabulary})[0]
	return errors.Join(errs...)
}

func formOf(t gguf.Type, in int) form {
	if kind, ok := ggml.RepackedKind(ggml.Type(t)); ok && in%32 == 0 {
		return form{repacked: kind}
	}
	return form{packed: true}
}

func (s *Server) matrix(f form, in, out int) servedMatrix {
	bytes := ggml.PackedBytes(in, out)
	if !f.packed {
		bytes = ggml.RepackedBytes(f.repacked, in, out)
	}
	return servedMatrix{in, out, f, s.weights.New(ggml.I8, bytes)}
}

// fill puts a tensor of the file at a row of the matrix, a band of rows at a time, so that threads share large ones.
func (s *Server) fill(m servedMatrix, source gguf.Tensor, row int) {
	rows := int(source.Shape[1])
	rowBytes := int(source.Bytes) / rows
	const band = 48 * 128 // whole panels of either form
	for from := 0; from < rows; from += band {
		n := min(band, rows-from)
		s.fills = append(s.fills, func() {
			data := s.file.Data(source)[from*rowBytes : (from+n)*rowBytes]
			if !m.form.packed {
				m.t.SetRepacked(data, ggml.Type(source.Type), row+from, m.in, m.out)
				return
			}
			const few = 64
			values := make([]float32, few*m.in)
			for r := 0; r < n; r += few {
				count := min(few, n-r)
				part := values[:count*m.in]
				ggml.Dequantize(part, ggml.Type(source.Type), data[r*rowBytes:(r+count)*rowBytes])
				m.t.SetPackedRows(part, row+from+r, m.in, m.out)
			}
		})
	}
	s.forget = append(s.forget, source)
}

func floatsOf(data []byte) []float32 {
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(data))), len(data)/4)
}
