package gguf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSafetensorsRoundTrip(t *testing.T) {
	t.Parallel()
	want := []Float32Tensor{
		{"a.lora_A.weight", []int64{2, 3}, []float32{1, 2, 3, 4, 5, 6}},
		{"b", []int64{}, []float32{7}},
		{"c", []int64{0, 4}, []float32{}},
	}
	var buf bytes.Buffer
	if err := WriteSafetensors(&buf, map[string]string{"format": "pt"}, []Float32Tensor{want[2], want[0], want[1]}); err != nil {
		t.Fatal(err)
	}
	n := binary.LittleEndian.Uint64(buf.Bytes())
	if (8+n)%8 != 0 {
		t.Errorf("the data begin at byte %d, which is not aligned to 8", 8+n)
	}
	header := strings.TrimRight(string(buf.Bytes()[8:8+n]), " ")
	wantHeader := `{"__metadata__":{"format":"pt"},"a.lora_A.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},` +
		`"b":{"dtype":"F32","shape":[],"data_offsets":[24,28]},"c":{"dtype":"F32","shape":[0,4],"data_offsets":[28,28]}}`
	if header != wantHeader {
		t.Errorf("header\n%s, want\n%s", header, wantHeader)
	}
	got, metadata, err := parseSafetensors(&buf, int64(buf.Len()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" || metadata["format"] != "pt" {
		t.Errorf("metadata %v, tensors (-want +got):\n%s", metadata, diff)
	}
}

func safetensors(header string, data int) []byte {
	out := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(out, header...), make([]byte, data)...)
}

func TestSafetensorsRefuses(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, header string
		data         int
		want         string
	}{
		{"no object", `[]`, 0, "JSON object"},
		{"broken", `{"a":`, 0, "JSON object"},
		{"something behind", `{}{}`, 0, "follows"},
		{"duplicate", `{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}`, 4, "twice"},
		{"unknown field", `{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}`, 4, "unknown field"},
		{"type", `{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}`, 8, "expected F32"},
		{"negative shape", `{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}`, 4, "negative"},
		{"overflow", `{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}`, 4, "overflows"},
		{"shape and data differ", `{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}`, 4, "takes 2 elements"},
		{"beyond the end", `{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}`, 4, "end by 4"},
		{"negative offset", `{"a":{"dtype":"F32","shape":[2],"data_offsets":[-4,4]}}`, 4, "begin at 0"},
		{"overlap", `{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}`, 8, "begin at 8"},
		{"unused data", `{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}`, 8, "tensors end at 4"},
		{"metadata", `{"__metadata__":{"a":1}}`, 0, "object of strings"},
	} {
		file := safetensors(tt.header, tt.data)
		_, _, err := parseSafetensors(bytes.NewReader(file), int64(len(file)))
		if !errors.As(err, new(*FormatError)) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want *FormatError with %q", tt.name, err, tt.want)
		}
	}
	for _, file := range [][]byte{nil, {1, 2}, binary.LittleEndian.AppendUint64(nil, 1<<63), binary.LittleEndian.AppendUint64(nil, 100)} {
		if _, _, err := parseSafetensors(bytes.NewReader(file), int64(len(file))); !errors.As(err, new(*FormatError)) {
			t.Errorf("%v: error %v, want *FormatError", file, err)
		}
	}
}

func TestHalf(t *testing.T) {
	t.Parallel()
	for h, want := range map[uint16]float32{0: 0, 0x3c00: 1, 0xc000: -2, 0x7bff: 65504, 0x0001: 1.0 / (1 << 24),
		0x0400: 1.0 / (1 << 14), 0x3555: 0.333251953125, 0x7c00: float32(math.Inf(1))} {
		if got := half(h); got != want {
			t.Errorf("half(%#04x) = %v, want %v", h, got, want)
		}
	}
}

func FuzzSafetensors(f *testing.F) {
	f.Add(safetensors(`{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}`, 4))
	f.Add(safetensors(fmt.Sprintf(`{"a":{"dtype":"F32","shape":[%d,0],"data_offsets":[0,0]}}`, int64(math.MaxInt64)), 0))
	f.Fuzz(func(t *testing.T, data []byte) {
		tensors, _, err := parseSafetensors(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		for _, tensor := range tensors {
			if n, ok := product(tensor.Shape); !ok || n != int64(len(tensor.Data)) {
				t.Fatalf("tensor %q of shape %v has %d elements", tensor.Name, tensor.Shape, len(tensor.Data))
			}
		}
	})
}
