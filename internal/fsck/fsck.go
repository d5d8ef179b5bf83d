// Package fsck examines a data directory that no server has open: the database, the blobs against their rows, the
// adapters and models against their manifests, and what killed processes left. It can repair what it finds.
//
//	report, err := fsck.Check(ctx, home, fsck.Options{})
//	for _, f := range report.Findings { fmt.Println(f.What, f.Problem) }
//
// Nothing that could be somebody's is destroyed: what is damaged, or belongs to nothing, is moved to lost+found.
package fsck

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/models"
	"github.com/hone-llm/hone/internal/store"
)

// Options of Check.
type Options struct {
	Repair bool
}

// Report is what Check found.
type Report struct {
	Dir      string          `json:"dir"`
	Findings []store.Finding `json:"findings"`
}

// Left counts the findings that are not repaired; those that the next start clears up by itself do not count.
func (r *Report) Left() (n int) {
	for _, f := range r.Findings {
		if !f.Repaired && !f.Leftover {
			n++
		}
	}
	return n
}

// Check examines the data directory dir, which it locks, and repairs what it finds if that is asked for. It reads every
// byte of files, adapters and models. It returns *store.InUseError while a server has the directory, and the error of a
// repair that failed, with the report as far as it came.
func Check(ctx context.Context, dir string, opts Options) (report Report, err error) {
	in, err := store.Inspect(dir)
	if err != nil {
		return Report{}, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	report = Report{Dir: in.Dir(), Findings: []store.Finding{}}
	c := checker{in: in}
	for _, check := range []func(context.Context) ([]store.Finding, error){in.Database, in.Blobs, c.adapters, c.jobs, c.models} {
		found, err := check(ctx)
		if err != nil {
			return report, err
		}
		database := len(report.Findings) == 0 && len(found) > 0 && found[0].What == store.DatabaseFile
		for _, f := range found {
			if opts.Repair && f.Repair != nil {
				if err := f.Repair(ctx); err != nil {
					return report, fmt.Errorf("repair %s: %w", f.What, err)
				}
				f.Repaired = true
			}
			report.Findings = append(report.Findings, f)
		}
		if !database {
			continue
		}
		if !opts.Repair {
			break // the rows cannot be trusted
		}
		// The new database is another file.
		if err := in.Reopen(); err != nil {
			return report, err
		}
	}
	return report, nil
}

type checker struct {
	in *store.Inspection
}

// remove and lose are repairs.
func (c *checker) remove(name string) func(context.Context) error {
	return func(context.Context) error { return c.in.Remove(name) }
}

func (c *checker) lose(name string) func(context.Context) error {
	return func(context.Context) error { return c.in.Lose(name) }
}

// entries lists a directory below the data directory. A missing one is empty.
func (c *checker) entries(name string) ([]fs.DirEntry, error) {
	entries, err := os.ReadDir(filepath.Join(c.in.Dir(), name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return entries, err
}

const (
	remedyLost    = "moves it to " + store.LostDir
	remedyRemoved = "removes it"
)

// adapters compares the adapters with their rows and their manifests.
func (c *checker) adapters(ctx context.Context) (found []store.Finding, err error) {
	rows, err := c.in.Adapters(ctx)
	if err != nil {
		return nil, err
	}
	deleteRow := func(ctx context.Context, id string) error {
		return c.in.Exec(ctx, `DELETE FROM adapters WHERE id = ?`, id)
	}
	known := map[string]bool{}
	for _, row := range rows {
		known[row.ID] = true
		place := path.Join("adapters", row.ID)
		if row.Deleted {
			found = append(found, store.Finding{
				What: "adapter " + row.Name, Problem: "its deletion was cut off", Leftover: true, Remedy: "finishes it",
				Repair: func(ctx context.Context) error {
					if err := c.in.Remove(place); err != nil {
						return err
					}
					return deleteRow(ctx, row.ID)
				},
			})
			continue
		}
		err := c.adapter(ctx, row)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			found = append(found, store.Finding{
				What: "adapter " + row.Name, Problem: err.Error(), Remedy: "removes the row, and moves what is left of the adapter to " + store.LostDir,
				Repair: func(ctx context.Context) error {
					if err := c.in.Lose(place); err != nil {
						return err
					}
					return deleteRow(ctx, row.ID)
				},
			})
		}
	}
	dirs, err := c.entries("adapters")
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		name := path.Join("adapters", d.Name())
		switch _, err := lora.ReadManifest(filepath.Join(c.in.Dir(), name)); {
		case known[d.Name()]:
		case strings.HasPrefix(d.Name(), "."):
			found = append(found, store.Finding{What: name, Problem: "taking up an adapter was cut off", Leftover: true, Remedy: remedyRemoved, Repair: c.remove(name)})
		case err == nil:
			found = append(found, store.Finding{What: name, Problem: "the adapter has no row", Leftover: true, Remedy: "the next start of the server takes it up"})
		default:
			found = append(found, store.Finding{What: name, Problem: fmt.Sprintf("it has no row and is no adapter: %v", err), Remedy: remedyLost, Repair: c.lose(name)})
		}
	}
	return found, nil
}

// adapter returns what is wrong with the adapter of a row.
func (c *checker) adapter(ctx context.Context, row store.Adapter) error {
	dir := filepath.Join(c.in.Dir(), "adapters", row.ID)
	m, err := lora.ReadManifest(dir)
	if err != nil {
		return err
	}
	if m.ID != row.ID || m.Name != row.Name || m.BaseDigest != row.BaseDigest {
		return fmt.Errorf("its manifest is that of %s (%s, base %.12s), the row says %s, base %.12s", m.Name, m.ID, m.BaseDigest, row.ID, row.BaseDigest)
	}
	for _, name := range slices.Sorted(maps.Keys(m.Files)) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		got, err := durable.Digest(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if want := m.Files[name]; got != want {
			return fmt.Errorf("%s is damaged: sha256 %.12s, the manifest says %.12s", name, got, want)
		}
	}
	return nil
}

// jobs compares the directories of jobs with their rows, and resume states with their digests.
func (c *checker) jobs(ctx context.Context) (found []store.Finding, err error) {
	statuses, err := c.in.JobStatuses(ctx)
	if err != nil {
		return nil, err
	}
	dirs, err := c.entries("jobs")
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		name := path.Join("jobs", d.Name())
		status, ok := statuses[d.Name()]
		switch {
		case strings.HasPrefix(d.Name(), "."):
			found = append(found, store.Finding{What: name, Problem: "a dry run was cut off", Leftover: true, Remedy: remedyRemoved, Repair: c.remove(name)})
		case !ok:
			found = append(found, store.Finding{What: name, Problem: "the job has no row", Remedy: remedyLost, Repair: c.lose(name)})
		case store.Final(status):
			left, err := filepath.Glob(filepath.Join(c.in.Dir(), name, "a*", "*"))
			if err != nil {
				return nil, err
			}
			for _, file := range left {
				if !strings.HasSuffix(file, ".log") && !empty(file) {
					relative := path.Join(name, filepath.Base(filepath.Dir(file)), filepath.Base(file))
					found = append(found, store.Finding{What: relative, Problem: "the job is " + status, Leftover: true, Remedy: remedyRemoved, Repair: c.remove(relative)})
				}
			}
		default:
			states, err := filepath.Glob(filepath.Join(c.in.Dir(), name, "a*", "state-*"))
			if err != nil {
				return nil, err
			}
			for _, state := range states {
				if ctx.Err() != nil {
					return nil, context.Cause(ctx)
				}
				if err := resumeState(state); err != nil {
					relative := path.Join(name, filepath.Base(filepath.Dir(state)), filepath.Base(state))
					found = append(found, store.Finding{
						What: relative, Problem: fmt.Sprintf("the resume state is damaged: %v; the job goes on from an older one, or from its beginning", err),
						Remedy: remedyLost, Repair: c.lose(relative),
					})
				}
			}
		}
	}
	return found, nil
}

// empty reports whether there are no files in a directory or below.
func empty(dir string) bool {
	files := 0
	err := filepath.WalkDir(dir, func(_ string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			files++
		}
		return err
	})
	return err == nil && files == 0
}

// resumeState returns what is wrong with the resume state in dir, as the trainer would find it.
func resumeState(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		return err
	}
	var state struct {
		SHA256 string `json:"state_sha256"`
	}
	if err := json.Unmarshal(data, &state); err != nil {
		return fmt.Errorf("state.json: %w", err)
	}
	got, err := durable.Digest(filepath.Join(dir, "state.safetensors"))
	if err == nil && got != state.SHA256 {
		err = fmt.Errorf("state.safetensors has sha256 %.12s, expected %.12s", got, state.SHA256)
	}
	return err
}

// models compares the weights of the base models with their manifests.
func (c *checker) models(ctx context.Context) (found []store.Finding, err error) {
	dirs, err := c.entries("models")
	if err != nil || len(dirs) == 0 {
		return nil, err
	}
	all, err := models.Open(filepath.Join(c.in.Dir(), "models"), models.Options{})
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		name := path.Join("models", d.Name())
		if strings.HasPrefix(d.Name(), ".") {
			found = append(found, store.Finding{What: name, Problem: "adding a model was cut off", Leftover: true, Remedy: remedyRemoved, Repair: c.remove(name)})
			continue
		}
		model, err := all.Get(d.Name())
		if err == nil {
			err = model.Check(ctx)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			found = append(found, store.Finding{
				What: "model " + d.Name(), Problem: err.Error(),
				Remedy: remedyLost + "; hone pull or hone models add bring it back, and its adapters fit if the sha256 is the same", Repair: c.lose(name),
			})
		}
	}
	return found, nil
}
