package runner

import (
	"fmt"
	"io"
	"os"

	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// widened writes a copy of a model whose matrices are bfloat16 into a temporary file: GPUs multiply these two to three times
// as fast as 4-bit weights from a hundred tokens on. The caller removes the file when it is loaded.
func widened(f *gguf.File) (path string, err error) {
	metadata := make([]gguf.KeyValue, 0, len(f.Keys))
	for _, key := range f.Keys {
		metadata = append(metadata, gguf.KeyValue{Key: key, Value: f.Metadata[key]})
	}
	tensors := make([]gguf.TensorData, len(f.Tensors))
	for i, t := range f.Tensors {
		tensors[i] = gguf.TensorData{Name: t.Name, Shape: t.Shape, Type: t.Type, Data: f.Data(t)}
		if len(t.Shape) == 2 && t.Type != gguf.BF16 && ggml.Dequantizable(ggml.Type(t.Type)) {
			tensors[i].Type, tensors[i].Data = gguf.BF16, nil
			tensors[i].Stream = func(w io.Writer) error { return widenRows(w, f, t) }
		}
	}
	out, err := os.CreateTemp("", "hone-bf16-*.gguf")
	if err != nil {
		return "", fmt.Errorf("the bfloat16 copy of %s: %w", f.Path, err)
	}
	if err = gguf.Write(out, metadata, tensors); err == nil {
		err = out.Close()
	} else {
		_ = out.Close() // the first error counts
	}
	if err != nil {
		_ = os.Remove(out.Name())
		return "", fmt.Errorf("the bfloat16 copy of %s, %d bytes in the directory for temporary files: %w", f.Path, 2*f.Size, err)
	}
	return out.Name(), nil
}

// widenRows writes the rows of a matrix as bfloat16.
func widenRows(w io.Writer, f *gguf.File, t gguf.Tensor) error {
	columns, rows, data := t.Shape[0], t.Shape[1], f.Data(t)
	defer f.Forget(t)
	rowBytes := int64(len(data)) / rows
	values, wide := make([]float32, columns), make([]byte, 2*columns)
	for row := range rows {
		ggml.Dequantize(values, ggml.Type(t.Type), data[row*rowBytes:(row+1)*rowBytes])
		ggml.Quantize(wide, ggml.BF16, values)
		if _, err := w.Write(wide); err != nil {
			return err
		}
	}
	return nil
}
