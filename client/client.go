// Package client talks to hone: go-openai's client, the requests that it has no types for, and the multiple-choice
// predictor with its files.
//
//	c := client.New("http://127.0.0.1:8080/v1", "")
//	questions, err := client.ReadQuestions("test.csv", client.ReadOptions{})
//	predictor, err := c.NewPredictor(ctx, client.PredictorOptions{Model: "ft:..."})
//	err = predictor.Run(ctx, questions, func(p client.Prediction) error { fmt.Println(p.Question.ID, p.Answer); return nil })
//
// Everything that OpenAI's API has goes through the embedded go-openai client, so code written against it works as it is.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/internal/wire"
)

// DefaultBaseURL is where `hone serve` listens unless it is told otherwise.
const DefaultBaseURL = "http://127.0.0.1:8080/v1"

// The API's objects with hone's extensions, which go-openai's types leave out.
type (
	Model                = wire.Model
	ModelDetails         = wire.ModelDetails
	File                 = wire.File
	FineTuningJob        = wire.FineTuningJob
	FineTuningJobRequest = wire.FineTuningJobRequest
	FineTuningJobEvent   = wire.FineTuningJobEvent
	FineTuningProgress   = wire.FineTuningProgress
	FineTuningCheckpoint = wire.FineTuningJobCheckpoint
	FineTuningDryRun     = wire.FineTuningDryRun
	Hyperparameters      = wire.Hyperparameters
	FineTuningMethod     = wire.FineTuningMethod
	SupervisedMethod     = wire.SupervisedMethod
	DPOMethod            = wire.DPOMethod

	ChatCompletionRequest = wire.ChatCompletionRequest
	ChatCompletion        = wire.ChatCompletion
	Message               = wire.Message
	Sampling              = wire.Sampling
	Constraints           = wire.Constraints
	ResponseFormat        = wire.ResponseFormat
	JSONSchema            = wire.JSONSchema
	StructuredOutputs     = wire.StructuredOutputs
	ChatTemplateKwargs    = wire.ChatTemplateKwargs
	ChoiceProbability     = wire.ChoiceProbability

	DecisionRequest  = wire.DecisionRequest
	DecisionInput    = wire.DecisionInput
	DecisionQuestion = wire.DecisionQuestion
	DecisionChoice   = wire.DecisionChoice
	DecisionLevel    = wire.DecisionLevel
	ChoiceValue      = wire.ChoiceValue
	Decision         = wire.Decision
	DecisionAnswer   = wire.DecisionAnswer

	TokenizeRequest  = wire.TokenizeRequest
	TokenizeResponse = wire.TokenizeResponse
)

// Number is a hyper-parameter that is given and not "auto".
func Number[T int | float64](v T) *wire.Auto[T] { return wire.Number(v) }

// Client sends requests to one server. Goroutines may share it.
type Client struct {
	*openai.Client
	baseURL string
	key     string
	http    *http.Client
}

// New returns a client of the API at baseURL, which ends in /v1; "" is DefaultBaseURL. A server without configured keys
// takes any key, also "".
func New(baseURL, key string) *Client {
	if baseURL == "" {
		baseURL = DefaultBaseURL
	}
	baseURL = strings.TrimRight(baseURL, "/")
	transport := http.DefaultTransport.(*http.Transport).Clone()
	// The predictor keeps this many requests in flight to one host; the default of 2 idle connections would reconnect for
	// nearly every question.
	transport.MaxIdleConnsPerHost = 64
	httpClient := &http.Client{Transport: bodyCopier{transport}}
	config := openai.DefaultConfig(key)
	config.BaseURL = baseURL
	config.HTTPClient = httpClient
	return &Client{Client: openai.NewClientWithConfig(config), baseURL: baseURL, key: key, http: httpClient}
}

// BaseURL is the address that requests go to, without a slash at its end.
func (c *Client) BaseURL() string { return c.baseURL }

// APIError is an answer of the server that is not a success: its status, and OpenAI's error object.
type APIError struct {
	Status  int
	Message string
	Type    string
	Param   string
	Code    string
}

func (e *APIError) Error() string { return fmt.Sprintf("%s (HTTP %d)", e.Message, e.Status) }

// Model returns one model with hone's details, which hold the question template of a tuned model.
func (c *Client) Model(ctx context.Context, id string) (Model, error) {
	var model Model
	return model, c.do(ctx, http.MethodGet, "/models/"+url.PathEscape(id), nil, &model)
}

// UploadFile stores a training file, JSON Lines of chats, under name.
func (c *Client) UploadFile(ctx context.Context, name string, data []byte) (openai.File, error) {
	file, err := c.CreateFileBytes(ctx, openai.FileBytesRequest{Name: name, Bytes: data, Purpose: openai.PurposeFineTune})
	return file, explain(err)
}

// CreateJob starts a fine-tuning job. Unlike go-openai's call it can send seed, method and the `hone` object.
func (c *Client) CreateJob(ctx context.Context, req FineTuningJobRequest) (FineTuningJob, error) {
	var job FineTuningJob
	return job, c.do(ctx, http.MethodPost, "/fine_tuning/jobs", req, &job)
}

// DryRun checks a job's request and files as far as the first step, and returns what the job would do. It makes no job.
func (c *Client) DryRun(ctx context.Context, req FineTuningJobRequest) (FineTuningDryRun, error) {
	var result FineTuningDryRun
	return result, c.do(ctx, http.MethodPost, "/fine_tuning/jobs/dry_run", req, &result)
}

// Job returns a job with its progress and its error.
func (c *Client) Job(ctx context.Context, id string) (FineTuningJob, error) {
	var job FineTuningJob
	return job, c.do(ctx, http.MethodGet, "/fine_tuning/jobs/"+url.PathEscape(id), nil, &job)
}

// Jobs returns up to limit jobs, newest first, that come after the job of id after ("" begins with the newest), and
// whether there are more.
func (c *Client) Jobs(ctx context.Context, after string, limit int) ([]FineTuningJob, bool, error) {
	return list[FineTuningJob](ctx, c, "/fine_tuning/jobs", after, limit)
}

// CancelJob ends a job and returns it.
func (c *Client) CancelJob(ctx context.Context, id string) (FineTuningJob, error) {
	var job FineTuningJob
	return job, c.do(ctx, http.MethodPost, "/fine_tuning/jobs/"+url.PathEscape(id)+"/cancel", nil, &job)
}

// PauseJob lets a job wait, also a running one, which saves its state before; it returns the job.
func (c *Client) PauseJob(ctx context.Context, id string) (FineTuningJob, error) {
	var job FineTuningJob
	return job, c.do(ctx, http.MethodPost, "/fine_tuning/jobs/"+url.PathEscape(id)+"/pause", nil, &job)
}

// ResumeJob lets a paused job go on and returns it.
func (c *Client) ResumeJob(ctx context.Context, id string) (FineTuningJob, error) {
	var job FineTuningJob
	return job, c.do(ctx, http.MethodPost, "/fine_tuning/jobs/"+url.PathEscape(id)+"/resume", nil, &job)
}

// Events returns up to limit lines of a job's log, newest first, that come after the event of id after, and whether
// there are more.
func (c *Client) Events(ctx context.Context, jobID, after string, limit int) ([]FineTuningJobEvent, bool, error) {
	return list[FineTuningJobEvent](ctx, c, "/fine_tuning/jobs/"+url.PathEscape(jobID)+"/events", after, limit)
}

// Checkpoints returns up to limit servable checkpoints of a job, newest first, that come after the one of id after, and
// whether there are more.
func (c *Client) Checkpoints(ctx context.Context, jobID, after string, limit int) ([]FineTuningCheckpoint, bool, error) {
	return list[FineTuningCheckpoint](ctx, c, "/fine_tuning/jobs/"+url.PathEscape(jobID)+"/checkpoints", after, limit)
}

// Finished says whether a job of this status will not change any more.
func Finished(status string) bool {
	return status == "succeeded" || status == "failed" || status == "cancelled"
}

// WatchJob asks for a job every interval (0: one second), calls update with each answer, and returns the job once it is
// finished, whatever its end. It goes on through a server that is away for up to a minute: jobs survive a restart.
func (c *Client) WatchJob(ctx context.Context, id string, interval time.Duration, update func(FineTuningJob)) (FineTuningJob, error) {
	if interval <= 0 {
		interval = time.Second
	}
	var awaySince time.Time
	for {
		job, err := c.Job(ctx, id)
		switch {
		case err == nil:
			awaySince = time.Time{}
			if update != nil {
				update(job)
			}
			if Finished(job.Status) {
				return job, nil
			}
		case ctx.Err() != nil || !retryable(err):
			return job, fmt.Errorf("watch job %s: %w", id, err)
		case awaySince.IsZero():
			awaySince = time.Now()
		case time.Since(awaySince) > time.Minute:
			return job, fmt.Errorf("watch job %s: %w", id, err)
		}
		if err := sleep(ctx, interval); err != nil {
			return job, err
		}
	}
}

// WaitReady returns once the server answers its health check, or when ctx ends.
func (c *Client) WaitReady(ctx context.Context) error {
	health := strings.TrimSuffix(c.baseURL, "/v1") + "/health"
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, health, nil)
		if err != nil {
			return err
		}
		resp, err := c.http.Do(req)
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body) // only to reuse the connection
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("no server at %s: %w", c.baseURL, err)
		}
	}
}

func list[T any](ctx context.Context, c *Client, path, after string, limit int) ([]T, bool, error) {
	query := url.Values{}
	if after != "" {
		query.Set("after", after)
	}
	if limit > 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	var page wire.List[T]
	err := c.do(ctx, http.MethodGet, path, nil, &page)
	return page.Data, page.HasMore, err
}

// do sends one request with an optional JSON body and decodes the JSON answer into out.
func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.baseURL+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.key != "" {
		req.Header.Set("Authorization", "Bearer "+c.key)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return explain(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return answerError(resp.StatusCode, data)
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("%s %s: the answer is not what hone sends: %w", method, path, err)
	}
	return nil
}

func answerError(status int, body []byte) error {
	var envelope wire.ErrorResponse
	if err := json.Unmarshal(body, &envelope); err != nil || envelope.Error == nil {
		return &APIError{Status: status, Message: fmt.Sprintf("unexpected answer %.200q", body)}
	}
	e := &APIError{Status: status, Message: envelope.Error.Message, Type: envelope.Error.Type}
	if envelope.Error.Param != nil {
		e.Param = *envelope.Error.Param
	}
	if envelope.Error.Code != nil {
		e.Code = *envelope.Error.Code
	}
	return e
}

// explain turns go-openai's errors into *APIError and says what to do when nothing listens.
func explain(err error) error {
	var api *openai.APIError
	var request *openai.RequestError
	var op *net.OpError
	switch {
	case errors.As(err, &api):
		e := &APIError{Status: api.HTTPStatusCode, Message: api.Message, Type: api.Type}
		if api.Param != nil {
			e.Param = *api.Param
		}
		if api.Code != nil {
			e.Code = fmt.Sprint(api.Code)
		}
		return e
	case errors.As(err, &request) && request.HTTPStatusCode != 0:
		return &APIError{Status: request.HTTPStatusCode, Message: fmt.Sprintf("unexpected answer %.200q", request.Body)}
	case errors.As(err, &op) && op.Op == "dial":
		return fmt.Errorf("%w: is `hone serve` running there?", err)
	}
	return err
}

// retryable says whether the same request may succeed later: the server is away, restarting, or asks to slow down.
func retryable(err error) bool {
	if api, ok := errors.AsType[*APIError](err); ok {
		return api.Status == http.StatusTooManyRequests || api.Status >= http.StatusInternalServerError
	}
	var netErr net.Error
	return errors.As(err, &netErr) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
