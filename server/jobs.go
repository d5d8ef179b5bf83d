package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/wire"
)

// Jobs are the fine-tuning jobs; finetune.Jobs implements it. An unknown id is finetune.ErrNotFound.
type Jobs interface {
	Create(ctx context.Context, spec finetune.Spec) (*finetune.Job, error)    // *finetune.InvalidError
	DryRun(ctx context.Context, spec finetune.Spec) (*finetune.DryRun, error) // *finetune.InvalidError, *finetune.JobError
	Get(ctx context.Context, id string) (*finetune.Job, error)
	List(ctx context.Context, q finetune.Query) (jobs []finetune.Job, more bool, err error)
	Cancel(ctx context.Context, id string) (*finetune.Job, error) // *finetune.ConflictError
	Pause(ctx context.Context, id string) (*finetune.Job, error)  // *finetune.ConflictError
	Resume(ctx context.Context, id string) (*finetune.Job, error) // *finetune.ConflictError
	Unfinished(ctx context.Context, base string) (ids []string, err error)
	Events(ctx context.Context, id, after string, limit int) (events []finetune.Event, more bool, err error)
	Checkpoints(ctx context.Context, id, after string, limit int) (checkpoints []finetune.Checkpoint, more bool, err error)
}

// maxMetadata is how many pairs a job can have.
const maxMetadata = 16

// organization stands in every job: OpenAI's schema requires one, and hone has no organizations.
const organization = "org-local"

func (s *Server) createJob(c *gin.Context) error {
	spec, err := decodeSpec(c)
	if err != nil {
		return err
	}
	ctx, done, err := s.once(c, s.showJob)
	if done || err != nil {
		return err
	}
	job, err := s.jobs.Create(ctx, spec)
	if err != nil {
		return fmt.Errorf("create job for %q: %w", spec.Model, err)
	}
	return encodeJob(c, job)
}

// dryRun answers what the job of the same request would do, without making one.
func (s *Server) dryRun(c *gin.Context) error {
	spec, err := decodeSpec(c)
	if err != nil {
		return err
	}
	result, err := s.jobs.DryRun(c.Request.Context(), spec)
	if failed := new(finetune.JobError); errors.As(err, &failed) {
		refused := invalid(failed.Param, "%s", failed.Message)
		refused.Code = &failed.Code
		return refused
	}
	if err != nil {
		return fmt.Errorf("dry run of a job for %q: %w", spec.Model, err)
	}
	shown := wire.FineTuningDryRun{
		Object: "fine_tuning.job.dry_run", Model: result.Model, StartAdapter: result.StartAdapter, Method: wire.FineTuningMethod{Type: result.MethodType},
		TrainingFile: result.TrainingFile, ValidationFile: unlessZero(result.ValidationFile),
		TrainRows: result.TrainRows, ValidRows: result.ValidRows, TrainTokens: result.TrainTokens, ValidTokens: result.ValidTokens,
		SharedTokens: result.SharedTokens, TruncatedRows: result.TruncatedRows, DroppedRows: result.DroppedRows, Notes: append([]string{}, result.Notes...),
	}
	if shown.Options, err = json.Marshal(result.Options); err != nil {
		return fmt.Errorf("encode options: %w", err)
	}
	if shown.Plan, err = json.Marshal(result.Plan); err != nil {
		return fmt.Errorf("encode plan: %w", err)
	}
	return encode(c, http.StatusOK, shown)
}

func decodeSpec(c *gin.Context) (finetune.Spec, error) {
	var req wire.FineTuningJobRequest
	if err := decode(c, &req, refuseMisplaced); err != nil {
		return finetune.Spec{}, err
	}
	return jobSpec(&req)
}

// jobSpec translates a request. Ranges, and what is given twice, are the jobs' to check.
func jobSpec(req *wire.FineTuningJobRequest) (finetune.Spec, error) {
	spec := finetune.Spec{Model: req.Model, TrainingFile: req.TrainingFile, Seed: req.Seed, Metadata: req.Metadata, MethodType: finetune.Supervised}
	if err := refuseIntegrations(req.Integrations); err != nil {
		return spec, err
	}
	switch {
	case req.Suffix != nil && *req.Suffix == "":
		return spec, invalid("suffix", "suffix is empty; expected 1 to 64 characters, or leave it out")
	case req.ValidationFile != nil && *req.ValidationFile == "":
		return spec, invalid("validation_file", "validation_file is empty; expected the id of a file, or leave it out")
	}
	if req.ValidationFile != nil {
		spec.ValidationFile = *req.ValidationFile
	}
	if req.Suffix != nil {
		spec.Suffix = *req.Suffix
	}
	if req.Method != nil {
		if req.Method.Type == "" {
			return spec, invalid("method.type", "method.type is missing; expected supervised or dpo")
		}
		spec.MethodType = req.Method.Type
	}
	given, err := hyperparameters(req)
	if err != nil {
		return spec, err
	}
	if given.NEpochs != nil {
		spec.Requested.NEpochs = given.NEpochs.Value
	}
	if given.BatchSize != nil {
		spec.Requested.BatchSize = given.BatchSize.Value
	}
	if given.LearningRateMultiplier != nil {
		spec.Requested.LearningRateMultiplier = given.LearningRateMultiplier.Value
	}
	if given.Beta != nil {
		spec.Requested.Beta = given.Beta.Value
	}
	if len(req.Hone) > 0 && !isNull(req.Hone) {
		spec.Options, err = finetune.DecodeOptions(req.Hone)
	}
	return spec, err
}

// refuseIntegrations names those that are asked for: hone has none.
func refuseIntegrations(raw json.RawMessage) error {
	if len(raw) == 0 || isNull(raw) {
		return nil
	}
	var list []struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return invalid("integrations", "integrations: expected a list of objects with a type, not %s", kindOf(raw))
	}
	switch {
	case len(list) == 0:
		return nil
	case list[0].Type == "":
		return invalid("integrations[0].type", "integrations[0].type is missing; integrations are not available, leave them out")
	}
	return invalid("integrations[0].type", "the integration %.40q is not available; leave integrations out. The losses are in the job's events and in its result file", list[0].Type)
}

// hyperparameters finds OpenAI's in the method or in their deprecated place.
func hyperparameters(req *wire.FineTuningJobRequest) (wire.Hyperparameters, error) {
	var old wire.Hyperparameters
	if req.Hyperparameters != nil {
		old = *req.Hyperparameters
	}
	if req.Method == nil {
		return old, nil
	}
	var given *wire.Hyperparameters
	for _, m := range []struct {
		kind  string
		there bool
		given func() *wire.Hyperparameters
	}{
		{finetune.Supervised, req.Method.Supervised != nil, func() *wire.Hyperparameters { return req.Method.Supervised.Hyperparameters }},
		{finetune.DPO, req.Method.DPO != nil, func() *wire.Hyperparameters { return req.Method.DPO.Hyperparameters }},
	} {
		switch {
		case !m.there:
		case req.Method.Type == m.kind:
			given = m.given()
		case req.Method.Type == finetune.Supervised || req.Method.Type == finetune.DPO: // another is refused as such
			return old, invalid("method."+m.kind, "method.%s is given, and method.type is %s; leave out one of them", m.kind, req.Method.Type)
		}
	}
	if given == nil {
		return old, nil
	}
	if old != (wire.Hyperparameters{}) {
		return old, invalid("hyperparameters", "hyperparameters are given twice; leave them out in favour of method.%s.hyperparameters", req.Method.Type)
	}
	return *given, nil
}

func (s *Server) listJobs(c *gin.Context) error {
	limit, err := limitOf(c, 20, 1000)
	if err != nil {
		return err
	}
	query := finetune.Query{After: c.Query("after"), Limit: limit, Metadata: c.QueryMap("metadata")}
	if only, sent := c.GetQuery("metadata"); sent {
		if only != "null" {
			return invalid("metadata", "metadata is %.60q; expected metadata[key]=value, or metadata=null for jobs without any", only)
		}
		query.NoMetadata = true
	}
	for key := range c.Request.URL.Query() {
		if name, ok := strings.CutPrefix(key, "metadata["); ok && strings.Trim(name, "]") == "" {
			return invalid("metadata", "%.60q names no key; expected metadata[key]=value, or metadata=null for jobs without any", key)
		}
	}
	if len(query.Metadata) > maxMetadata {
		return invalid("metadata", "metadata has %d pairs; a job has at most %d", len(query.Metadata), maxMetadata)
	}
	jobs, more, err := s.jobs.List(c.Request.Context(), query)
	if err != nil {
		return err
	}
	list := []wire.FineTuningJob{}
	for _, job := range jobs {
		shown, err := jobToWire(&job)
		if err != nil {
			return err
		}
		list = append(list, shown)
	}
	return encode(c, http.StatusOK, page(list, more, func(j wire.FineTuningJob) string { return j.ID }))
}

func (s *Server) getJob(c *gin.Context) error { return s.showJob(c, c.Param("id")) }

func (s *Server) showJob(c *gin.Context, id string) error {
	job, err := s.jobs.Get(c.Request.Context(), id)
	if err != nil {
		return err
	}
	return encodeJob(c, job)
}

func (s *Server) cancelJob(c *gin.Context) error {
	job, err := s.jobs.Cancel(c.Request.Context(), c.Param("id"))
	if err != nil {
		return err
	}
	return encodeJob(c, job)
}

func (s *Server) pauseJob(c *gin.Context) error {
	job, err := s.jobs.Pause(c.Request.Context(), c.Param("id"))
	if err != nil {
		return err
	}
	return encodeJob(c, job)
}

func (s *Server) resumeJob(c *gin.Context) error {
	job, err := s.jobs.Resume(c.Request.Context(), c.Param("id"))
	if err != nil {
		return err
	}
	return encodeJob(c, job)
}

func (s *Server) listEvents(c *gin.Context) error {
	limit, err := limitOf(c, 20, 1000)
	if err != nil {
		return err
	}
	events, more, err := s.jobs.Events(c.Request.Context(), c.Param("id"), c.Query("after"), limit)
	if err != nil {
		return err
	}
	list := []wire.FineTuningJobEvent{}
	for _, e := range events {
		shown := wire.FineTuningJobEvent{ID: e.ID, Object: "fine_tuning.job.event", CreatedAt: e.CreatedAt, Level: e.Level, Message: e.Message, Type: e.Type, Data: e.Data}
		if len(shown.Data) == 0 {
			shown.Data = json.RawMessage("{}")
		}
		list = append(list, shown)
	}
	return encode(c, http.StatusOK, page(list, more, func(e wire.FineTuningJobEvent) string { return e.ID }))
}

func (s *Server) listCheckpoints(c *gin.Context) error {
	limit, err := limitOf(c, 10, 1000)
	if err != nil {
		return err
	}
	checkpoints, more, err := s.jobs.Checkpoints(c.Request.Context(), c.Param("id"), c.Query("after"), limit)
	if err != nil {
		return err
	}
	list := []wire.FineTuningJobCheckpoint{}
	for _, p := range checkpoints {
		list = append(list, wire.FineTuningJobCheckpoint{
			ID: p.ID, Object: "fine_tuning.job.checkpoint", CreatedAt: p.CreatedAt, Model: p.Model, StepNumber: p.StepNumber,
			FineTuningJob: p.JobID, MetricsAtPoint: p.Metrics,
		})
	}
	return encode(c, http.StatusOK, page(list, more, func(p wire.FineTuningJobCheckpoint) string { return p.ID }))
}

func encodeJob(c *gin.Context, job *finetune.Job) error {
	c.Set(jobField, job.ID)
	shown, err := jobToWire(job)
	if err != nil {
		return err
	}
	return encode(c, http.StatusOK, shown)
}

func jobToWire(job *finetune.Job) (wire.FineTuningJob, error) {
	h := &wire.Hyperparameters{
		NEpochs:                &wire.Auto[int]{Value: job.Hyperparameters.NEpochs},
		BatchSize:              &wire.Auto[int]{Value: job.Hyperparameters.BatchSize},
		LearningRateMultiplier: &wire.Auto[float64]{Value: job.Hyperparameters.LearningRateMultiplier},
	}
	method := &wire.FineTuningMethod{Type: job.MethodType}
	switch job.MethodType {
	case finetune.DPO:
		h.Beta = &wire.Auto[float64]{Value: job.Hyperparameters.Beta}
		method.DPO = &wire.DPOMethod{Hyperparameters: h}
	default:
		method.Supervised = &wire.SupervisedMethod{Hyperparameters: h}
	}
	shown := wire.FineTuningJob{
		ID: job.ID, Object: "fine_tuning.job", CreatedAt: job.CreatedAt, FinishedAt: unlessZero(job.FinishedAt), Model: job.Model,
		FineTunedModel: unlessZero(job.FineTunedModel), OrganizationID: organization, Status: string(job.Status),
		Hyperparameters: *h, Method: method,
		TrainingFile: job.TrainingFile, ValidationFile: unlessZero(job.ValidationFile), ResultFiles: job.ResultFiles,
		Seed: job.Seed, EstimatedFinish: unlessZero(job.EstimatedFinish), Metadata: job.Metadata, UserSuffix: unlessZero(job.Suffix),
	}
	details := wire.FineTuningDetails{Attempt: job.Attempt, StartAdapter: job.StartAdapter, Paused: job.Paused}
	if shown.ResultFiles == nil {
		shown.ResultFiles = []string{}
	}
	if job.Status.Final() {
		shown.TrainedTokens = &job.TrainedTokens
	}
	if job.Error != nil {
		shown.Error = &wire.FineTuningJobError{Code: job.Error.Code, Message: job.Error.Message, Param: unlessZero(job.Error.Param)}
	}
	options, err := json.Marshal(job.Options)
	if err != nil {
		return shown, fmt.Errorf("encode the options of job %s: %w", job.ID, err)
	}
	if string(options) != "{}" {
		details.Options = options
	}
	if job.Plan != nil {
		if details.Plan, err = json.Marshal(job.Plan); err != nil {
			return shown, fmt.Errorf("encode the plan of job %s: %w", job.ID, err)
		}
	}
	if p := job.Progress; job.Attempt > 0 {
		details.Usage = &wire.FineTuningUsage{TrainedTokens: job.TrainedTokens, RunSeconds: job.RunSeconds}
		details.Progress = &wire.FineTuningProgress{
			Step: p.Step, TotalSteps: p.TotalSteps, StepFraction: p.Fraction, TokensPerSecond: p.TokensPerSecond, SecondsLeft: p.SecondsLeft,
			TrainLoss: p.TrainLoss, ValidLoss: p.ValidLoss, ValidAccuracy: p.ValidAccuracy,
			ValidChoiceAccuracy: p.ValidChoiceAccuracy,
		}
	}
	if job.Attempt > 0 || details.Options != nil || details.StartAdapter != "" || details.Paused != "" {
		shown.Hone = &details // absent from a job that asked for no more than OpenAI's and has not run
	}
	return shown, nil
}

// unlessZero is nil, written as null, for the zero value.
func unlessZero[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}
