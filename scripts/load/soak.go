package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// soak is everything that the server does, at random, for long: what it holds must not grow.
type soak struct {
	duration time.Duration
	samples  string // file
	seed     uint64

	client http.Client
	server *server
	ctx    context.Context

	mu       sync.Mutex
	adapters []string // that may be asked
	failures []error

	jobs, chats, cancelled, uploads, batches, deletes atomic.Int64
}

// sample is what the server holds at a moment. Memory and descriptors are of all its processes by role; a trainer is a new
// process for each job.
type sample struct {
	at                     time.Duration
	serve, runner, trainer float64 // bytes, anonymous
	goroutines             float64 // of serve
	files, runnerFiles     float64 // descriptors
	directory              float64 // bytes
}

func (s *soak) run(ctx context.Context, srv *server) error {
	s.server = srv
	fmt.Printf("soak for %v, seed %d, samples in %s\n", s.duration, s.seed, s.samples)
	working, cancel := context.WithTimeout(ctx, s.duration)
	defer cancel()
	s.ctx = working
	var workers sync.WaitGroup
	begin := func(n uint64, each func(*rand.Rand) error, pause time.Duration) {
		random := rand.New(rand.NewPCG(s.seed, n))
		workers.Go(func() {
			for working.Err() == nil {
				if err := each(random); err != nil && working.Err() == nil {
					s.mu.Lock()
					s.failures = append(s.failures, err)
					s.mu.Unlock()
				}
				select {
				case <-time.After(time.Duration(random.Int64N(int64(2 * pause)))):
				case <-working.Done():
				}
			}
		})
	}
	begin(1, s.job, time.Second)
	for n := range uint64(4) {
		begin(10+n, s.chat, 100*time.Millisecond)
	}
	begin(20, s.upload, 500*time.Millisecond)
	begin(21, s.parts, 500*time.Millisecond)
	begin(30, s.batch, 2*time.Second)
	samples, err := s.sampling(working)
	workers.Wait()
	if err != nil {
		return err
	}
	fmt.Printf("%d jobs, %d chats (%d of them broken off), %d uploads, %d batches, %d deletes, %d failures\n",
		s.jobs.Load(), s.chats.Load(), s.cancelled.Load(), s.uploads.Load(), s.batches.Load(), s.deletes.Load(), len(s.failures))
	if n := len(s.failures); n > maxFailures {
		s.failures = append(s.failures[:maxFailures], fmt.Errorf("and %d more", n-maxFailures))
	}
	return errors.Join(append(s.failures, judge(samples)...)...)
}

// sampling writes down what the server holds, every few seconds.
func (s *soak) sampling(ctx context.Context) (samples []sample, err error) {
	if err := os.MkdirAll(filepath.Dir(s.samples), 0o755); err != nil {
		return nil, err
	}
	f, err := os.Create(s.samples)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	fmt.Fprintln(f, "seconds,serve_bytes,runner_bytes,trainer_bytes,goroutines,files,runner_files,directory_bytes,jobs,chats")
	began := time.Now()
	ticks := time.NewTicker(min(5*time.Second, s.duration/40))
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return samples, nil
		case <-ticks.C:
		}
		now := s.look()
		now.at = time.Since(began)
		samples = append(samples, now)
		_, err := fmt.Fprintf(f, "%.0f,%.0f,%.0f,%.0f,%.0f,%.0f,%.0f,%.0f,%d,%d\n", now.at.Seconds(), now.serve, now.runner, now.trainer,
			now.goroutines, now.files, now.runnerFiles, now.directory, s.jobs.Load(), s.chats.Load())
		if err != nil {
			return nil, err
		}
	}
}

// look reads /proc, the data directory and /metrics.
func (s *soak) look() (now sample) {
	now.directory = float64(directoryBytes(s.server.home))
	pids, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range pids {
		status, err := os.ReadFile(dir + "/status")
		if err != nil {
			continue // it has ended
		}
		pid, _ := strconv.Atoi(filepath.Base(dir))
		own := pid == s.server.pid
		if !own && field(status, "PPid:") != float64(s.server.pid) {
			continue
		}
		bytes := field(status, "RssAnon:") * 1024
		files, _ := os.ReadDir(dir + "/fd")
		command, _ := os.ReadFile(dir + "/cmdline")
		switch {
		case own:
			now.serve, now.files = bytes, float64(len(files))
		case strings.Contains(string(command), "\x00runner"):
			now.runner, now.runnerFiles = now.runner+bytes, now.runnerFiles+float64(len(files))
		default:
			now.trainer += bytes
		}
	}
	req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, s.server.url+"/metrics", http.NoBody)
	if err != nil {
		return now
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return now
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	now.goroutines = field(text, "\ngo_goroutines ")
	return now
}

// field is the number behind a key, 0 if there is none.
func field(text []byte, key string) float64 {
	_, rest, _ := bytes.Cut(text, []byte(key))
	number, _, _ := strings.Cut(strings.TrimSpace(string(rest[:min(len(rest), 64)])), "\n")
	number, _, _ = strings.Cut(number, " ")
	value, _ := strconv.ParseFloat(number, 64)
	return value
}

// judge compares the second quarter with the last: the first warms up. What is held may differ by a twentieth and a little.
func judge(samples []sample) (broken []error) {
	n := len(samples)
	if n < 8 {
		return []error{fmt.Errorf("%d samples are too few", n)}
	}
	for _, q := range []struct {
		name, unit  string
		of          func(sample) float64
		scale, free float64 // free: what may be added; negative: anything
	}{
		{"memory of serve", "MB", func(s sample) float64 { return s.serve }, 1e6, 8e6},
		{"memory of the runner", "MB", func(s sample) float64 { return s.runner }, 1e6, 8e6},
		{"memory of trainers", "MB", func(s sample) float64 { return s.trainer }, 1e6, -1},
		{"goroutines of serve", "", func(s sample) float64 { return s.goroutines }, 1, 20},
		{"descriptors of serve", "", func(s sample) float64 { return s.files }, 1, 20},
		{"descriptors of the runner", "", func(s sample) float64 { return s.runnerFiles }, 1, 20},
		{"data directory", "MB", func(s sample) float64 { return s.directory }, 1e6, -1},
	} {
		second, last := median(samples[n/4:n/2], q.of), median(samples[n*3/4:], q.of)
		fmt.Printf("%-26s second quarter %.1f, last %.1f, most %.1f %s; %+.2f an hour\n", q.name, second/q.scale, last/q.scale,
			q.of(slices.MaxFunc(samples, func(a, b sample) int { return int(q.of(a) - q.of(b)) }))/q.scale, q.unit, slope(samples[n/4:], q.of)/q.scale)
		if q.free >= 0 && last > 1.05*second+q.free {
			broken = append(broken, fmt.Errorf("%s grew from %.1f to %.1f %s", q.name, second/q.scale, last/q.scale, q.unit))
		}
	}
	return broken
}

func median(samples []sample, of func(sample) float64) float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = of(s)
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// slope is the line of least squares through what was sampled, for an hour.
func slope(samples []sample, of func(sample) float64) float64 {
	var x, y, xx, xy float64
	n := float64(len(samples))
	for _, s := range samples {
		at := s.at.Hours()
		x, y, xx, xy = x+at, y+of(s), xx+at*at, xy+at*of(s)
	}
	return (n*xy - x*y) / (n*xx - x*x)
}

// call sends a request and decodes the answer into out, if that is not nil. It fails for another status than 200.
func (s *soak) call(method, path, contentType string, body io.Reader, out any) error {
	req, err := http.NewRequestWithContext(s.ctx, method, s.server.url+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s %s", method, path, resp.Status, data)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(data, out)
}

func (s *soak) post(path string, body, out any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return s.call(http.MethodPost, path, "application/json", bytes.NewReader(data), out)
}

func (s *soak) get(path string, out any) error {
	return s.call(http.MethodGet, path, "", http.NoBody, out)
}

func (s *soak) remove(path string) error {
	s.deletes.Add(1)
	return s.call(http.MethodDelete, path, "", http.NoBody, nil)
}

// form sends a form with a file.
func (s *soak) form(path, name, field string, content []byte, values map[string]string, out any) error {
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	for key, value := range values {
		if err := form.WriteField(key, value); err != nil {
			return err
		}
	}
	part, err := form.CreateFormFile(field, name)
	if err == nil {
		_, err = part.Write(content)
	}
	if err == nil {
		err = form.Close()
	}
	if err != nil {
		return err
	}
	return s.call(http.MethodPost, path, form.FormDataContentType(), &body, out)
}

// object is what the soak reads of files, uploads, jobs and batches.
type object struct {
	ID             string
	Status         string
	FineTunedModel string   `json:"fine_tuned_model"`
	ResultFiles    []string `json:"result_files"`
	OutputFileID   string   `json:"output_file_id"`
	ErrorFileID    string   `json:"error_file_id"`
	Error          struct{ Message string }
}

func rows(random *rand.Rand, n int) []byte {
	var b bytes.Buffer
	for i := range n {
		fmt.Fprintf(&b, `{"messages":[{"role":"user","content":"%d: %s"},{"role":"assistant","content":"%c"}]}`+"\n", random.Uint64(), strings.Repeat("word ", random.IntN(8)), 'A'+i%4)
	}
	return b.Bytes()
}

// await asks for an object until its status is one of these.
func (s *soak) await(path string, statuses ...string) (o object, err error) {
	for {
		if err := s.get(path, &o); err != nil || slices.Contains(statuses, o.Status) {
			return o, err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-s.ctx.Done():
			return o, s.ctx.Err()
		}
	}
}

// job trains an adapter, which chats ask while it is there, and deletes what came of an earlier one. Some jobs are cancelled.
func (s *soak) job(random *rand.Rand) error {
	var file, job object
	if err := s.form("/v1/files", "train.jsonl", "file", rows(random, 16+random.IntN(48)), map[string]string{"purpose": "fine-tune"}, &file); err != nil {
		return err
	}
	err := s.post("/v1/fine_tuning/jobs", map[string]any{"model": s.server.model, "training_file": file.ID, "seed": random.IntN(1000),
		"hone": map[string]any{"max_steps": 5 + random.IntN(20)}}, &job)
	if err != nil {
		return err
	}
	path := "/v1/fine_tuning/jobs/" + job.ID
	cancel := random.IntN(5) == 0
	if cancel {
		select {
		case <-time.After(time.Duration(random.IntN(1000)) * time.Millisecond):
		case <-s.ctx.Done():
		}
		_ = s.call(http.MethodPost, path+"/cancel", "", http.NoBody, nil) // it may be done
	}
	if job, err = s.await(path, "succeeded", "failed", "cancelled"); err != nil {
		return err
	}
	s.jobs.Add(1)
	if job.Status != "succeeded" && !cancel {
		return fmt.Errorf("job %s: %s %s", job.ID, job.Status, job.Error.Message)
	}
	for _, id := range append(job.ResultFiles, file.ID) {
		if err := s.remove("/v1/files/" + id); err != nil {
			return err
		}
	}
	if job.FineTunedModel == "" {
		return nil
	}
	s.mu.Lock()
	s.adapters = append(s.adapters, job.FineTunedModel)
	old := ""
	if len(s.adapters) > 3 {
		old, s.adapters = s.adapters[0], s.adapters[1:]
	}
	s.mu.Unlock()
	if old == "" {
		return nil
	}
	return s.remove("/v1/models/" + url.PathEscape(old))
}

// chat asks the model or an adapter, whole or as a stream; some streams are broken off.
func (s *soak) chat(random *rand.Rand) error {
	model := s.server.model
	s.mu.Lock()
	if n := len(s.adapters); n > 0 && random.IntN(2) == 0 {
		model = s.adapters[n-1] // not the next to be deleted
	}
	s.mu.Unlock()
	stream := random.IntN(2) == 0
	body, err := json.Marshal(map[string]any{
		"model": model, "stream": stream, "max_tokens": 1 + random.IntN(64), "temperature": random.Float64(), "ignore_eos": true,
		"messages": []any{map[string]string{"role": "user", "content": fmt.Sprint(random.Uint64(), strings.Repeat(" word", random.IntN(40)))}},
	})
	if err != nil {
		return err
	}
	s.chats.Add(1)
	if !stream {
		return s.call(http.MethodPost, "/v1/chat/completions", "application/json", bytes.NewReader(body), nil)
	}
	req, err := http.NewRequestWithContext(s.ctx, http.MethodPost, s.server.url+"/v1/chat/completions", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if random.IntN(4) == 0 {
		_, _ = io.CopyN(io.Discard, resp.Body, random.Int64N(2000)) // then it goes away
		s.cancelled.Add(1)
		return nil
	}
	text, err := io.ReadAll(resp.Body)
	if err == nil && !bytes.HasSuffix(bytes.TrimSpace(text), []byte("[DONE]")) {
		err = fmt.Errorf("a stream of %s ended with %s %q", model, resp.Status, text[max(0, len(text)-300):])
	}
	return err
}

// upload sends a file, reads it and deletes it.
func (s *soak) upload(random *rand.Rand) error {
	content := rows(random, 1+random.IntN(5000))
	var file object
	if err := s.form("/v1/files", "some.jsonl", "file", content, map[string]string{"purpose": "user_data"}, &file); err != nil {
		return err
	}
	s.uploads.Add(1)
	req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, s.server.url+"/v1/files/"+file.ID+"/content", http.NoBody)
	if err != nil {
		return err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	back, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if !bytes.Equal(back, content) {
		return fmt.Errorf("file %s came back with %d bytes, it had %d", file.ID, len(back), len(content))
	}
	return s.remove("/v1/files/" + file.ID)
}

// parts uploads a file in parts; some uploads are cancelled.
func (s *soak) parts(random *rand.Rand) error {
	chunks := [][]byte{rows(random, 1+random.IntN(2000)), rows(random, 1+random.IntN(2000))}
	var upload object
	err := s.post("/v1/uploads", map[string]any{"filename": "parts.jsonl", "purpose": "fine-tune", "mime_type": "text/jsonl", "bytes": len(chunks[0]) + len(chunks[1])}, &upload)
	if err != nil {
		return err
	}
	var ids []string
	for _, chunk := range chunks {
		var part object
		if err := s.form("/v1/uploads/"+upload.ID+"/parts", "part", "data", chunk, nil, &part); err != nil {
			return err
		}
		ids = append(ids, part.ID)
	}
	s.uploads.Add(1)
	if random.IntN(2) == 0 {
		s.deletes.Add(1)
		return s.call(http.MethodPost, "/v1/uploads/"+upload.ID+"/cancel", "", http.NoBody, nil)
	}
	var whole struct{ File object }
	if err := s.post("/v1/uploads/"+upload.ID+"/complete", map[string]any{"part_ids": ids}, &whole); err != nil {
		return err
	}
	return s.remove("/v1/files/" + whole.File.ID)
}

// batch has a file of requests answered, and deletes the files; some batches are cancelled.
func (s *soak) batch(random *rand.Rand) error {
	var lines bytes.Buffer
	for i := range 5 + random.IntN(20) {
		fmt.Fprintf(&lines, `{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":{"model":%q,"max_tokens":8,"messages":[{"role":"user","content":"%d"}]}}`+"\n",
			i, s.server.model, random.Uint64())
	}
	var file, batch object
	if err := s.form("/v1/files", "batch.jsonl", "file", lines.Bytes(), map[string]string{"purpose": "batch"}, &file); err != nil {
		return err
	}
	if err := s.post("/v1/batches", map[string]any{"input_file_id": file.ID, "endpoint": "/v1/chat/completions", "completion_window": "24h"}, &batch); err != nil {
		return err
	}
	cancel := random.IntN(4) == 0
	if cancel {
		_ = s.call(http.MethodPost, "/v1/batches/"+batch.ID+"/cancel", "", http.NoBody, nil) // it may be done
	}
	batch, err := s.await("/v1/batches/"+batch.ID, "completed", "failed", "cancelled", "expired")
	if err != nil {
		return err
	}
	s.batches.Add(1)
	if batch.Status != "completed" && !cancel {
		return fmt.Errorf("batch %s is %s", batch.ID, batch.Status)
	}
	for _, id := range []string{file.ID, batch.OutputFileID, batch.ErrorFileID} {
		if id == "" {
			continue
		}
		if err := s.remove("/v1/files/" + id); err != nil {
			return err
		}
	}
	return nil
}
