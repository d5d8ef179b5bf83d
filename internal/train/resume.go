package train

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/gguf"
)

// A resume state is a directory state-<step> of two files: state.safetensors with the adapter's weights and both
// moments as flat arrays, and state.json, written last, with everything else. The data position and the random state
// follow from the step, the plan and the seed, the reference of a preference job from what it began with.
const (
	stateFile     = "state.safetensors"
	manifestFile  = "state.json"
	statePrefix   = "state-"
	keptStates    = 2
	stateVersion  = 3
	temporaryMark = ".tmp-"
)

// resumeState is state.json.
type resumeState struct {
	Version       int                  `json:"version"`
	JobID         string               `json:"job_id"`
	BaseDigest    string               `json:"base_digest"`
	Rows          int                  `json:"rows"` // of the training file that are trained on
	Plan          child.TrainPlan      `json:"plan"` // with the layout of the weights
	Step          int                  `json:"step"`
	TrainedTokens int64                `json:"trained_tokens"`
	Skipped       int                  `json:"skipped"`
	Evaluated     int                  `json:"evaluated"`
	Window        window               `json:"window"`
	Selection     selection            `json:"selection"`
	Checkpoints   []checkpoint         `json:"checkpoints"`
	Reported      []child.TrainerEvent `json:"reported,omitempty"`
	StateSHA256   string               `json:"state_sha256"`

	arrays map[string][]float32
}

func (t *trainer) state() resumeState {
	return resumeState{
		JobID: t.config.JobID, BaseDigest: t.config.BaseDigest, Rows: t.data.Rows, Plan: t.plan,
		Step: t.step, TrainedTokens: t.trained, Skipped: t.skipped, Evaluated: t.evaluated,
		Window: t.window, Selection: t.selection, Checkpoints: t.checkpoints, Reported: t.reported,
	}
}

func (s *resumeState) position() position {
	return position{
		step: s.Step, trained: s.TrainedTokens, skipped: s.Skipped, evaluated: s.Evaluated,
		window: s.Window, selection: s.Selection, checkpoints: s.Checkpoints, reported: s.Reported,
	}
}

// restore copies the state's arrays to where they are trained.
func (s *resumeState) restore(parameters []float32, m moments) error {
	for name, into := range map[string][]float32{"parameters": parameters, "first": m.first, "second": m.second} {
		if len(s.arrays[name]) != len(into) {
			return fmt.Errorf("resume state: %d values of %s, expected %d", len(s.arrays[name]), name, len(into))
		}
		copy(into, s.arrays[name])
	}
	s.arrays = nil
	return nil
}

// save writes a resume state, after which those of earlier attempts are not needed any more.
func (t *trainer) save() error {
	began := time.Now()
	if err := t.state().save(t.config.Dir, t.lora.Parameters, t.moments); err != nil {
		return err
	}
	for _, dir := range t.config.ResumeFrom {
		if err := removeStates(dir, 0); err != nil {
			return err
		}
	}
	t.saved, t.savedAt = t.step, time.Now()
	t.spent.saving += time.Since(began)
	return t.emit(child.TrainerEvent{Type: child.EventSaved, Step: t.step})
}

// save writes a resume state into dir and removes all but the newest two there, or, where the disk has no room for three, all
// but the newest before. Nothing is published before it is on the disk whole.
func (s resumeState) save(dir string, parameters []float32, m moments) error {
	err := s.write(dir, parameters, m)
	if durable.DiskFull(err) {
		if err := removeStates(dir, 1); err != nil {
			return err
		}
		err = s.write(dir, parameters, m)
	}
	if err != nil {
		return err
	}
	return removeStates(dir, keptStates)
}

// write is save without removing anything.
func (s resumeState) write(dir string, parameters []float32, m moments) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("resume state: %w", err)
	}
	name := fmt.Sprintf("%s%08d", statePrefix, s.Step)
	temporary := filepath.Join(dir, temporaryMark+name)
	if err := os.RemoveAll(temporary); err != nil {
		return fmt.Errorf("resume state: %w", err)
	}
	if err := os.Mkdir(temporary, 0o700); err != nil {
		return fmt.Errorf("resume state: %w", err)
	}
	defer os.RemoveAll(temporary) // of a failed attempt; after the rename there is nothing
	flat := func(name string, values []float32) gguf.Float32Tensor {
		return gguf.Float32Tensor{Name: name, Shape: []int64{int64(len(values))}, Data: values}
	}
	path := filepath.Join(temporary, stateFile)
	tensors := []gguf.Float32Tensor{flat("first", m.first), flat("parameters", parameters), flat("second", m.second)}
	if err := gguf.WriteSafetensorsFile(path, nil, tensors); err != nil {
		return fmt.Errorf("resume state of step %d: %w", s.Step, err)
	}
	var err error
	if s.StateSHA256, err = durable.Digest(path); err != nil {
		return fmt.Errorf("resume state of step %d: %w", s.Step, err)
	}
	s.Version = stateVersion
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("resume state of step %d: %w", s.Step, err)
	}
	if err := durable.WriteFile(filepath.Join(temporary, manifestFile), sealed(data)); err != nil {
		return fmt.Errorf("resume state of step %d: %w", s.Step, err)
	}
	if err := durable.SyncDir(temporary); err != nil {
		return fmt.Errorf("resume state of step %d: %w", s.Step, err)
	}
	final := filepath.Join(dir, name)
	if err := os.RemoveAll(final); err != nil {
		return fmt.Errorf("resume state of step %d: %w", s.Step, err)
	}
	if err := os.Rename(temporary, final); err != nil {
		return fmt.Errorf("resume state of step %d: %w", s.Step, err)
	}
	if err := durable.SyncDir(dir); err != nil {
		return fmt.Errorf("resume state of step %d: %w", s.Step, err)
	}
	return nil
}

// sealed appends to a JSON object its own sha256, as the last member: a flipped bit in a number would go unseen otherwise.
func sealed(object []byte) []byte {
	return fmt.Appendf(nil, `%s,"sha256":"%x"}`, object[:len(object)-1], sha256.Sum256(object))
}

// isSealed reports whether data is, byte for byte, what sealed returned.
func isSealed(data []byte) bool {
	last := bytes.LastIndexByte(data, ',')
	return last >= 0 && bytes.Equal(data, sealed(append(slices.Clone(data[:last]), '}')))
}

// removeStates removes all but the newest resume states of a directory, and what attempts that were killed left of one or of a
// checkpoint.
func removeStates(dir string, kept int) error {
	states, err := statesIn(dir)
	if err != nil {
		return err
	}
	remove := states[min(kept, len(states)):]
	for _, unfinished := range []string{temporaryMark + statePrefix + "*", filepath.Join("checkpoints", temporaryMark+"*")} {
		found, err := filepath.Glob(filepath.Join(dir, unfinished))
		if err != nil {
			return err
		}
		remove = append(remove, found...)
	}
	for _, old := range remove {
		if err := os.RemoveAll(old); err != nil {
			return fmt.Errorf("remove an old resume state: %w", err)
		}
	}
	return nil
}

// findState returns the newest valid resume state in the directories of earlier attempts (the first directory that
// has one), or nil. skipped says why newer ones were passed over.
func findState(dirs []string, jobID, baseDigest string) (state *resumeState, skipped []error) {
	for _, dir := range dirs {
		states, err := statesIn(dir)
		if err != nil {
			skipped = append(skipped, err)
			continue
		}
		for _, path := range states {
			s, err := readState(path)
			if err == nil && (s.JobID != jobID || s.BaseDigest != baseDigest) {
				err = errors.New("it belongs to another job or base model")
			}
			if err != nil {
				skipped = append(skipped, fmt.Errorf("resume state %s: %w", filepath.Base(path), err))
				continue
			}
			return s, skipped
		}
	}
	return nil, skipped
}

// statesIn lists the resume states of a directory, newest first. A missing directory has none.
func statesIn(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list resume states: %w", err)
	}
	var paths []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), statePrefix) {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	slices.Sort(paths)
	slices.Reverse(paths)
	return paths, nil
}

func readState(path string) (*resumeState, error) {
	data, err := os.ReadFile(filepath.Join(path, manifestFile))
	if err != nil {
		return nil, err
	}
	if !isSealed(data) {
		return nil, fmt.Errorf("%s is damaged: it is not as it was written", manifestFile)
	}
	s := new(resumeState)
	if err := json.Unmarshal(data, s); err != nil {
		return nil, err
	}
	if s.Version != stateVersion {
		return nil, fmt.Errorf("version %d is not %d", s.Version, stateVersion)
	}
	digest, err := durable.Digest(filepath.Join(path, stateFile))
	if err != nil {
		return nil, err
	}
	if digest != s.StateSHA256 {
		return nil, fmt.Errorf("%s is damaged: its sha256 is not the recorded one", stateFile)
	}
	tensors, _, err := gguf.ReadSafetensors(filepath.Join(path, stateFile))
	if err != nil {
		return nil, err
	}
	s.arrays = make(map[string][]float32)
	for _, t := range tensors {
		s.arrays[t.Name] = t.Data
	}
	return s, nil
}
