package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

// Files holds files and uploads; store.Store implements it. An unknown id is store.ErrNotFound.
type Files interface {
	CheckSpace(bytes int64) error // *store.SpaceError
	Stage(ctx context.Context, r io.Reader) (*store.Staged, error)
	Discard(blob *store.Staged) error
	MadeBy(ctx context.Context, i store.Idempotency) (id string, err error) // store.ErrKeyReused
	AddFile(ctx context.Context, blob *store.Staged, f store.NewFile) (store.File, error)
	File(ctx context.Context, id string) (store.File, error)
	OpenFile(ctx context.Context, id string) (store.File, io.ReadSeekCloser, error)
	Files(ctx context.Context, q store.FileQuery) (files []store.File, more bool, err error)
	DeleteFile(ctx context.Context, id string) error // *store.FileInUseError

	// Of uploads, *store.UploadError refuses what does not fit.
	CreateUpload(ctx context.Context, u store.Upload) (store.Upload, error)
	Upload(ctx context.Context, id string) (store.Upload, error)
	Part(ctx context.Context, id string) (store.UploadPart, error)
	PartBytes(ctx context.Context, uploadID string) (int64, error)
	AddPart(ctx context.Context, uploadID string, blob *store.Staged) (store.UploadPart, error)
	CompleteUpload(ctx context.Context, id string, partIDs []string, md5 string) (store.Upload, store.File, error)
	CancelUpload(ctx context.Context, id string) (store.Upload, error)
}

// Limits of an upload.
const (
	maxFileBytes     = 512 << 20
	maxFilenameBytes = 255
	maxFieldBytes    = 64 // of a form's field that is no file
	// maxFormBytes is what a form may hold beside the file: its boundaries, headers and other fields.
	maxFormBytes = 1 << 20
)

// purposes are OpenAI's. hone uses fine-tune and batch; the others are kept for clients that send them.
var purposes = []string{"fine-tune", "assistants", "batch", "vision", "user_data", "evals"}

// ownPurposes are those of files that a server makes.
var ownPurposes = []string{"batch_output", "fine-tune-results", "assistants_output"}

func checkPurpose(purpose string) error {
	switch {
	case slices.Contains(purposes, purpose):
		return nil
	case slices.Contains(ownPurposes, purpose):
		return invalid("purpose", "the purpose %s is of files that the server writes; expected one of %s", purpose, strings.Join(purposes, ", "))
	}
	return invalid("purpose", "purpose is %.64q, expected one of %s", purpose, strings.Join(purposes, ", "))
}

// Bounds of expires_after, OpenAI's, in seconds.
const (
	minLifetime = 3600
	maxLifetime = 2592000
)

// lifetimeOf checks an expires_after, of which nil is none; param names it.
func lifetimeOf(param string, after *wire.ExpiresAfter) (time.Duration, error) {
	switch {
	case after == nil:
		return 0, nil
	case after.Anchor != "created_at":
		return 0, invalid(param+".anchor", "%s.anchor is %.40q, expected created_at", param, after.Anchor)
	case after.Seconds < minLifetime || after.Seconds > maxLifetime:
		return 0, invalid(param+".seconds", "%s.seconds is %d, expected %d to %d", param, after.Seconds, minLifetime, maxLifetime)
	}
	return time.Duration(after.Seconds) * time.Second, nil
}

// fileForm is a form with one file in it, which is on disk but has no name yet.
type fileForm struct {
	fields map[string]string
	name   string        // of the file
	blob   *store.Staged // nil: the form has none
}

// readForm streams the file in the form's field of this name to disk; its size does not matter to memory. It refuses one of
// more than limit bytes, at once if the request says how long it is. Each field of the form, of the file its name, is shown to check
// when it comes, so that nothing is read in vain. The file's bytes come through content. The caller discards the blob.
func (s *Server) readForm(c *gin.Context, field string, limit int64, check func(name, value string) error, content func(io.Reader) io.Reader) (form fileForm, err error) {
	defer func() {
		if err != nil && form.blob != nil {
			err = errors.Join(err, s.files.Discard(form.blob))
			form.blob = nil
		}
	}()
	if err := checkEncoding(c); err != nil {
		c.Header("Connection", "close") // rather than reading what is not wanted
		return form, err
	}
	most := limit + maxFormBytes
	if c.Request.ContentLength > most {
		c.Header("Connection", "close") // rather than reading what is not wanted
		return form, tooLarge(field, limit)
	}
	if err := s.files.CheckSpace(max(c.Request.ContentLength, 0)); err != nil {
		c.Header("Connection", "close")
		return form, err
	}
	c.Request.Body = http.MaxBytesReader(c.Writer, c.Request.Body, most)
	parts, err := c.Request.MultipartReader()
	if errors.Is(err, http.ErrNotMultipart) {
		return form, wrongMedia("expected a multipart/form-data body with the field %s, not %s", field, cmp.Or(c.ContentType(), "one without a Content-Type"))
	}
	if err != nil {
		return form, invalid(field, "expected a multipart/form-data body with the field %s: %v", field, err)
	}
	form.fields = map[string]string{}
	for {
		part, err := parts.NextPart()
		if errors.Is(err, io.EOF) {
			form.digest(c)
			return form, nil
		}
		if err != nil {
			return form, formError(err, field, limit)
		}
		if name := part.FormName(); name != field {
			value, err := io.ReadAll(io.LimitReader(part, maxFieldBytes))
			if err == nil {
				_, err = io.Copy(io.Discard, part)
			}
			if err != nil {
				return form, formError(err, field, limit)
			}
			form.fields[name] = strings.TrimSpace(string(value))
			if err := check(name, form.fields[name]); err != nil {
				return form, err
			}
			continue
		}
		if form.blob != nil {
			return form, invalid(field, "the form has more than one %s", field)
		}
		form.name = part.FileName()
		if err := check(field, form.name); err != nil {
			c.Header("Connection", "close") // rather than reading what is not wanted
			return form, err
		}
		upload := &uploadReader{r: &fileLimit{r: part, left: limit}}
		form.blob, err = s.files.Stage(c.Request.Context(), content(upload))
		if upload.err != nil && c.Request.Context().Err() == nil {
			return form, formError(upload.err, field, limit) // the client's fault, not the store's
		}
		if err != nil {
			return form, err
		}
	}
}

// digest is what a form asks for, however it was cut into parts.
func (f *fileForm) digest(c *gin.Context) {
	for _, name := range slices.Sorted(maps.Keys(f.fields)) {
		digest(c, name, f.fields[name])
	}
	if f.blob != nil {
		digest(c, f.name, f.blob.Digest())
	}
}

// pickledEndings are those of files that are pickled, or programs (llamafile).
var pickledEndings = []string{".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".llamafile"}

// checkEnding refuses the names of files that are code for those who read them. hone reads none, but gives them on.
func checkEnding(param, name string) error {
	name = strings.ToLower(strings.TrimRight(name, ". \t"))
	for _, ending := range pickledEndings {
		if strings.HasSuffix(name, ending) {
			e := wrongMedia("files that end in %s are code for whoever reads them, and nothing here needs one: training data is JSONL, and weights are added as GGUF or safetensors with hone models add", ending)
			e.Param = &param
			return e
		}
	}
	return nil
}

// createFile answers POST /v1/files.
func (s *Server) createFile(c *gin.Context) error {
	after := new(wire.ExpiresAfter)
	expires := false
	form, err := s.readForm(c, "file", maxFileBytes, func(name, value string) error {
		var err error
		switch name {
		case "file":
			return checkEnding(name, value)
		case "purpose":
			return checkPurpose(value)
		case "expires_after":
			return invalid(name, "expected the fields expires_after[anchor] and expires_after[seconds]")
		case "expires_after[anchor]":
			after.Anchor, expires = value, true
		case "expires_after[seconds]":
			expires = true
			if after.Seconds, err = strconv.ParseInt(value, 10, 64); err != nil {
				return invalid("expires_after.seconds", "expires_after.seconds is %q, expected %d to %d", value, minLifetime, maxLifetime)
			}
		}
		return nil
	}, store.NotPickled)
	if err != nil {
		return err
	}
	if form.blob != nil {
		defer func() { _ = s.files.Discard(form.blob) }() // at the latest the next start removes it
	}
	name, err := filename(form.name)
	purpose := form.fields["purpose"]
	switch {
	case form.blob == nil:
		return invalid("file", "the form has no field named file")
	case err != nil:
		return err
	case form.blob.Bytes() == 0:
		return invalid("file", "the file %s is empty", name)
	case purpose == "":
		return invalid("purpose", "the form has no field named purpose; expected one of %s", strings.Join(purposes, ", "))
	}
	if !expires {
		after = nil
	}
	lifetime, err := lifetimeOf("expires_after", after)
	if err != nil {
		return err
	}
	ctx, done, err := s.once(c, s.showFile)
	if done || err != nil {
		return err
	}
	file, err := s.files.AddFile(ctx, form.blob, store.NewFile{Filename: name, Purpose: purpose, Lifetime: lifetime})
	if err != nil {
		return err
	}
	return encode(c, http.StatusOK, fileToWire(file))
}

// filename takes the last element of the name that the client sent. Nothing is ever opened under it.
func filename(name string) (string, error) {
	if i := strings.LastIndexAny(name, `/\`); i >= 0 { // clients may send a path
		name = name[i+1:]
	}
	name = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(name, "�"))
	if name == "" || name == "." || name == "/" {
		return "", invalid("file", "the form's field file is not a file: it has no file name")
	}
	if len(name) > maxFilenameBytes {
		return "", invalid("file", "the file's name is longer than %d bytes", maxFilenameBytes)
	}
	return name, nil
}

// uploadReader remembers the error that ended the reading, to tell it from one of the store.
type uploadReader struct {
	r   io.Reader
	err error
}

func (u *uploadReader) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		u.err = err
	}
	return n, err
}

// fileLimit is an error for a file that is longer than left bytes.
type fileLimit struct {
	r    io.Reader
	left int64
}

func (l *fileLimit) Read(p []byte) (int, error) {
	if int64(len(p)) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, new(http.MaxBytesError)
	}
	return n, err
}

// tooLarge refuses a file of more than limit bytes in the form's field of this name.
func tooLarge(field string, limit int64) *wire.Error {
	return &wire.Error{Status: http.StatusRequestEntityTooLarge, Type: wire.ErrorTypeInvalidRequest, Param: &field, Code: new("request_too_large"),
		Message: fmt.Sprintf("the %s is longer than %d MiB", field, limit>>20)}
}

// formError explains why a form with a file of at most limit bytes could not be read.
func formError(err error, field string, limit int64) error {
	switch {
	case errors.As(err, new(*http.MaxBytesError)):
		return tooLarge(field, limit)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return invalid(field, "the form ends before its last boundary: the upload was cut off")
	}
	return readError(err, field)
}

func (s *Server) listFiles(c *gin.Context) error {
	query := store.FileQuery{After: c.Query("after"), Purpose: c.Query("purpose")}
	var err error
	if query.Limit, err = limitOf(c, 10000, 10000); err != nil {
		return err
	}
	switch order := c.DefaultQuery("order", "desc"); order {
	case "asc":
		query.Ascending = true
	case "desc":
	default:
		return invalid("order", "order is %q, expected asc or desc", order)
	}
	files, more, err := s.files.Files(c.Request.Context(), query)
	if err != nil {
		return afterError(err, query.After)
	}
	list := []wire.File{}
	for _, file := range files {
		list = append(list, fileToWire(file))
	}
	return encode(c, http.StatusOK, page(list, more, func(f wire.File) string { return f.ID }))
}

// limitOf reads the query's limit.
func limitOf(c *gin.Context, standard, most int) (int, error) {
	raw, sent := c.GetQuery("limit")
	if !sent {
		return standard, nil
	}
	limit, err := strconv.Atoi(raw)
	if err != nil || limit < 1 || limit > most {
		return 0, invalid("limit", "limit is %q, expected 1 to %d", raw, most)
	}
	return limit, nil
}

// afterError blames a listing's cursor for an id that does not exist.
func afterError(err error, after string) error {
	if after != "" && errors.Is(err, store.ErrNotFound) {
		return invalid("after", "after is %q, which is not in the list", after)
	}
	return err
}

func (s *Server) getFile(c *gin.Context) error { return s.showFile(c, c.Param("id")) }

func (s *Server) showFile(c *gin.Context, id string) error {
	file, err := s.files.File(c.Request.Context(), id)
	if err != nil {
		return unknownFile(err, id)
	}
	return encode(c, http.StatusOK, fileToWire(file))
}

func unknownFile(err error, id string) error {
	if !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return &wire.Error{Status: http.StatusNotFound, Type: wire.ErrorTypeInvalidRequest, Param: new("id"), Code: new("not_found"),
		Message: fmt.Sprintf("the file %q does not exist", id)}
}

// fileContent sends the bytes as they were uploaded; a job's result file is plain CSV (OpenAI sends it in base64).
func (s *Server) fileContent(c *gin.Context) error {
	file, content, err := s.files.OpenFile(c.Request.Context(), c.Param("id"))
	if err != nil {
		return unknownFile(err, c.Param("id"))
	}
	defer content.Close()
	c.Header("Content-Type", "application/octet-stream")
	c.Header("X-Content-Type-Options", "nosniff")
	if disposition := mime.FormatMediaType("attachment", map[string]string{"filename": file.Filename}); disposition != "" {
		c.Header("Content-Disposition", disposition)
	}
	c.Header("ETag", `"`+file.SHA256+`"`)
	http.ServeContent(c.Writer, c.Request, "", time.Unix(file.CreatedAt, 0), content)
	return nil
}

func (s *Server) deleteFile(c *gin.Context) error {
	id := c.Param("id")
	if err := s.files.DeleteFile(c.Request.Context(), id); err != nil {
		return unknownFile(err, id)
	}
	return encode(c, http.StatusOK, wire.Deleted{ID: id, Object: "file", Deleted: true})
}

func fileToWire(f store.File) wire.File {
	file := wire.File{
		ID: f.ID, Object: "file", Bytes: f.Bytes, CreatedAt: f.CreatedAt, ExpiresAt: unlessZero(f.ExpiresAt),
		Filename: f.Filename, Purpose: f.Purpose, Status: "processed",
	}
	if f.Damage != "" {
		file.Status, file.StatusDetails = "error", &f.Damage
	}
	return file
}
