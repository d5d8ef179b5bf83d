package llama

/*
#include "bridge.h"
*/
import "C"

import (
	"errors"
	"fmt"
)

// Adapter is LoRA weights beside a loaded model. It changes the output of the contexts it is set in, never the model.
type Adapter struct {
	model *Model
	c     *C.struct_llama_adapter_lora
}

// LoadAdapter reads an adapter's GGUF file (llama_adapter_lora_init). The library checks that every tensor of it fits
// the model's tensor of the same name; the error holds its reason.
func LoadAdapter(m *Model, path string) (*Adapter, error) {
	if m.c == nil {
		return nil, ErrClosed
	}
	if m.vocabularyOnly {
		return nil, errors.New("load adapter: the model was loaded without its weights (VocabularyOnly)")
	}
	a := &Adapter{model: m}
	name, free := cString(path)
	defer free()
	ok, reason := failure(func() bool {
		a.c = C.llama_adapter_lora_init(m.c, name)
		return a.c != nil
	})
	if !ok {
		return nil, fmt.Errorf("load adapter %s: %s", path, reason)
	}
	return a, nil
}

// Free frees the adapter (llama_adapter_lora_free). It must not be set in a context any more; freeing twice or nil is
// allowed, freeing after the model is too.
func (a *Adapter) Free() {
	if a == nil || a.c == nil {
		return
	}
	C.llama_adapter_lora_free(a.c)
	a.c = nil
}
