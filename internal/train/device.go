package train

import (
	"errors"
	"fmt"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/ggml"
)

// openBackend opens the device that the job asks for, or that its plan was made for. Auto is the GPU with the most free
// memory, if there is one.
func (t *trainer) openBackend(decide bool) (err error) {
	wanted := or(t.config.Options.Device, "auto")
	if !decide {
		wanted = "cuda"
		if t.plan.Memory.Device == "cpu" {
			wanted = "cpu"
		}
	}
	if wanted == "cpu" {
		t.backend, err = ggml.NewCPU(t.threads)
		return err
	}
	t.backend, err = ggml.OpenGPU("")
	switch {
	case err == nil:
		return nil
	case wanted == "auto" && errors.Is(err, ggml.ErrNoDevice):
		t.backend, err = ggml.NewCPU(t.threads)
		return err
	case !decide:
		return fmt.Errorf("the job began on %s, which its resume state needs: %w", t.plan.Memory.Device, err)
	}
	return &child.Error{Code: child.CodeInvalidRequest, Message: fmt.Sprintf("device: cuda cannot be used: %v", err), Param: "hone.device"}
}
