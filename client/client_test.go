package client

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRequests checks what the calls that go-openai lacks put on the wire, and that they read the answers.
func TestRequests(t *testing.T) {
	t.Parallel()
	var got []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = append(got, fmt.Sprintf("%s %s %s %s", r.Method, r.RequestURI, r.Header.Get("Authorization"), body))
		switch r.Method + " " + r.URL.Path {
		case "GET /v1/fine_tuning/jobs", "GET /v1/fine_tuning/jobs/ftjob-1/events":
			fmt.Fprint(w, `{"object":"list","data":[{"id":"x"}],"has_more":true}`)
		case "GET /v1/models/no":
			w.WriteHeader(http.StatusBadGateway)
			fmt.Fprint(w, "<html>")
		default:
			fmt.Fprint(w, `{"id":"ftjob-1","status":"running","hone":{"progress":{"step":3,"total_steps":9}}}`)
		}
	}))
	defer server.Close()
	c := New(server.URL+"/v1", "secret")
	seed := int64(0)
	job, err := c.CreateJob(t.Context(), FineTuningJobRequest{Model: "m", TrainingFile: "file-1", Seed: &seed, Hone: []byte(`{"r":8}`),
		Method: &FineTuningMethod{Type: "supervised", Supervised: &SupervisedMethod{Hyperparameters: &Hyperparameters{NEpochs: Number(2)}}}})
	if err != nil || job.Hone.Progress.Step != 3 {
		t.Errorf("create: %+v, %v", job, err)
	}
	if _, err := c.Job(t.Context(), "ftjob-1"); err != nil {
		t.Error(err)
	}
	if _, err := c.CancelJob(t.Context(), "ftjob-1"); err != nil {
		t.Error(err)
	}
	if jobs, more, err := c.Jobs(t.Context(), "ftjob-0", 5); err != nil || !more || len(jobs) != 1 || jobs[0].ID != "x" {
		t.Errorf("jobs: %v, %v, %v", jobs, more, err)
	}
	if events, _, err := c.Events(t.Context(), "ftjob-1", "", 0); err != nil || len(events) != 1 {
		t.Errorf("events: %v, %v", events, err)
	}
	var api *APIError
	if _, err := c.Model(t.Context(), "no"); !errors.As(err, &api) || api.Error() != `unexpected answer "<html>" (HTTP 502)` {
		t.Errorf("not hone's error: %v", err)
	}
	want := []string{
		`POST /v1/fine_tuning/jobs Bearer secret {"model":"m","training_file":"file-1","seed":0,"method":{"type":"supervised","supervised":{"hyperparameters":{"n_epochs":2}}},"hone":{"r":8}}`,
		"GET /v1/fine_tuning/jobs/ftjob-1 Bearer secret ",
		"POST /v1/fine_tuning/jobs/ftjob-1/cancel Bearer secret ",
		"GET /v1/fine_tuning/jobs?after=ftjob-0&limit=5 Bearer secret ",
		"GET /v1/fine_tuning/jobs/ftjob-1/events Bearer secret ",
		"GET /v1/models/no Bearer secret ",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("requests (-want +got)\n%s", diff)
	}
}

func TestWatchJobGoesThroughARestart(t *testing.T) {
	t.Parallel()
	n := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n++
		switch n {
		case 2:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 3:
			panic(http.ErrAbortHandler)
		case 4:
			fmt.Fprint(w, `{"id":"j","status":"succeeded","fine_tuned_model":"ft:b:local:s:1"}`)
		default:
			fmt.Fprint(w, `{"id":"j","status":"running"}`)
		}
	}))
	defer server.Close()
	var seen []string
	job, err := New(server.URL+"/v1", "").WatchJob(t.Context(), "j", time.Millisecond, func(j FineTuningJob) { seen = append(seen, j.Status) })
	if err != nil || job.Status != "succeeded" || len(seen) != 2 {
		t.Errorf("job %+v, updates %v, %v", job, seen, err)
	}
}
