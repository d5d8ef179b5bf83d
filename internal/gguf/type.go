package gguf

import "fmt"

// Type is the element type of a tensor as ggml numbers them (enum ggml_type of ggml.h).
type Type uint32

// The element types of ggml as of the engine's version. The gaps (4, 5, 31..33, 36..38) are types that ggml removed.
const (
	F32    Type = 0
	F16    Type = 1
	Q4_0   Type = 2
	Q4_1   Type = 3
	Q5_0   Type = 6
	Q5_1   Type = 7
	Q8_0   Type = 8
	Q8_1   Type = 9
	Q2K    Type = 10
	Q3K    Type = 11
	Q4K    Type = 12
	Q5K    Type = 13
	Q6K    Type = 14
	Q8K    Type = 15
	IQ2XXS Type = 16
	IQ2XS  Type = 17
	IQ3XXS Type = 18
	IQ1S   Type = 19
	IQ4NL  Type = 20
	IQ3S   Type = 21
	IQ2S   Type = 22
	IQ4XS  Type = 23
	I8     Type = 24
	I16    Type = 25
	I32    Type = 26
	I64    Type = 27
	F64    Type = 28
	IQ1M   Type = 29
	BF16   Type = 30
	TQ10   Type = 34
	TQ20   Type = 35
	MXFP4  Type = 39
)

// layout is how ggml stores a type: blockBytes bytes hold blockSize elements of one row.
type layout struct {
	name       string
	blockSize  int64
	blockBytes int64
	weights    bool // may be the matrix of a matrix product; false for index types and ggml's internal formats
}

// layouts repeats type_traits of ggml.c and the block structures of ggml-common.h.
var layouts = map[Type]layout{
	F32:    {"f32", 1, 4, true},
	F16:    {"f16", 1, 2, true},
	BF16:   {"bf16", 1, 2, true},
	Q4_0:   {"q4_0", 32, 2 + 16, true},
	Q4_1:   {"q4_1", 32, 4 + 16, true},
	Q5_0:   {"q5_0", 32, 2 + 4 + 16, true},
	Q5_1:   {"q5_1", 32, 4 + 4 + 16, true},
	Q8_0:   {"q8_0", 32, 2 + 32, true},
	Q8_1:   {"q8_1", 32, 4 + 32, false},
	MXFP4:  {"mxfp4", 32, 1 + 16, true},
	Q2K:    {"q2_K", 256, 4 + 16 + 64, true},
	Q3K:    {"q3_K", 256, 2 + 64 + 32 + 12, true},
	Q4K:    {"q4_K", 256, 4 + 12 + 128, true},
	Q5K:    {"q5_K", 256, 4 + 12 + 128 + 32, true},
	Q6K:    {"q6_K", 256, 2 + 16 + 192, true},
	Q8K:    {"q8_K", 256, 4 + 256 + 32, false},
	IQ2XXS: {"iq2_xxs", 256, 2 + 64, true},
	IQ2XS:  {"iq2_xs", 256, 2 + 64 + 8, true},
	IQ2S:   {"iq2_s", 256, 2 + 64 + 16, true},
	IQ3XXS: {"iq3_xxs", 256, 2 + 96, true},
	IQ3S:   {"iq3_s", 256, 2 + 104 + 4, true},
	IQ1S:   {"iq1_s", 256, 2 + 32 + 16, true},
	IQ1M:   {"iq1_m", 256, 32 + 16 + 8, true},
	IQ4NL:  {"iq4_nl", 32, 2 + 16, true},
	IQ4XS:  {"iq4_xs", 256, 2 + 2 + 4 + 128, true},
	TQ10:   {"tq1_0", 256, 2 + 4 + 48, true},
	TQ20:   {"tq2_0", 256, 2 + 64, true},
	I8:     {"i8", 1, 1, false},
	I16:    {"i16", 1, 2, false},
	I32:    {"i32", 1, 4, false},
	I64:    {"i64", 1, 8, false},
	F64:    {"f64", 1, 8, false},
}

// String returns ggml's name of the type, such as "q4_1".
func (t Type) String() string {
	if l, ok := layouts[t]; ok {
		return l.name
	}
	return fmt.Sprintf("type %d", uint32(t))
}

// Known reports whether the engine has the type.
func (t Type) Known() bool { _, ok := layouts[t]; return ok }

// BlockSize is the number of elements that are stored together, 1 for plain types; 0 if the type is unknown.
func (t Type) BlockSize() int64 { return layouts[t].blockSize }

// TypeBytes is the size of one block of BlockSize elements (ggml_type_size); 0 if the type is unknown.
func (t Type) TypeBytes() int64 { return layouts[t].blockBytes }
