package server

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

// Files holds uploads and result files; store.Store implements it. An unknown id is store.ErrNotFound.
type Files interface {
	CreateFile(ctx context.Context, filename, purpose string, r io.Reader) (store.File, error)
	File(ctx context.Context, id string) (store.File, error)
	OpenFile(ctx context.Context, id string) (store.File, io.ReadSeekCloser, error)
	Files(ctx context.Context, q store.FileQuery) (files []store.File, more bool, err error)
	DeleteFile(ctx context.Context, id string) error
}

// Limits of an upload.
const (
	maxFileBytes     = 512 << 20
	maxFilenameBytes = 255
	maxPurposeBytes  = 64
	// maxFormBytes is what a form may hold beside the file: its boundaries, headers and other fields.
	maxFormBytes = 1 << 20
)

// purposes are OpenAI's. hone uses fine-tune; the others are kept for clients that send them.
var purposes = []string{"fine-tune", "assistants", "batch", "vision", "user_data", "evals"}

// createFile streams an upload to disk: its size does not matter to memory.
func (s *Server) createFile(c *gin.Context) error {
	c.Request.Body = http.MaxBytesReader(c.Writer, c.Request.Body, maxFileBytes+maxFormBytes)
	form, err := c.Request.MultipartReader()
	if errors.Is(err, http.ErrNotMultipart) {
		return wrongMedia("expected a multipart/form-data body with the fields purpose and file, not %s", cmp.Or(c.ContentType(), "one without a Content-Type"))
	}
	if err != nil {
		return invalid("file", "expected a multipart/form-data body with the fields purpose and file: %v", err)
	}
	var purpose string
	var spool *os.File // of a file that came before its purpose
	var spooledName string
	defer func() {
		if spool != nil {
			spool.Close()
		}
	}()
	for {
		part, err := form.NextPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return formError(err)
		}
		switch part.FormName() {
		case "purpose":
			value, err := io.ReadAll(io.LimitReader(part, maxPurposeBytes))
			if err != nil {
				return formError(err)
			}
			if purpose = strings.TrimSpace(string(value)); !slices.Contains(purposes, purpose) {
				return invalid("purpose", "purpose is %q, expected one of %s", purpose, strings.Join(purposes, ", "))
			}
		case "file":
			name, err := filename(part)
			if err != nil {
				return err
			}
			if spool != nil {
				return invalid("file", "the form has more than one file")
			}
			if purpose != "" {
				return s.storeFile(c, name, purpose, part)
			}
			if spool, err = spoolFile(part); err != nil {
				return err
			}
			spooledName = name
		case "expires_after", "expires_after[anchor]", "expires_after[seconds]":
			return invalid("expires_after", "expires_after is not available; delete the file when it is not needed any more")
		default:
			if _, err := io.Copy(io.Discard, part); err != nil {
				return formError(err)
			}
		}
	}
	switch {
	case spool == nil:
		return invalid("file", "the form has no field named file")
	case purpose == "":
		return invalid("purpose", "the form has no field named purpose; expected one of %s", strings.Join(purposes, ", "))
	}
	return s.storeFile(c, spooledName, purpose, spool)
}

// filename takes the last element of the name that the client sent. Nothing is ever opened under it.
func filename(part *multipart.Part) (string, error) {
	name := part.FileName()
	if i := strings.LastIndexByte(name, '\\'); i >= 0 { // Windows clients may send a path
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

// spoolFile copies a part into a file without a name, positioned at its start.
func spoolFile(part io.Reader) (*os.File, error) {
	file, err := os.CreateTemp("", "hone-upload-")
	if err != nil {
		return nil, fmt.Errorf("keep an upload: %w", err)
	}
	if err := os.Remove(file.Name()); err != nil {
		file.Close()
		return nil, fmt.Errorf("keep an upload: %w", err)
	}
	if _, err := io.Copy(file, &fileLimit{r: part, left: maxFileBytes}); err != nil {
		file.Close()
		return nil, formError(err)
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		file.Close()
		return nil, fmt.Errorf("keep an upload: %w", err)
	}
	return file, nil
}

func (s *Server) storeFile(c *gin.Context, name, purpose string, r io.Reader) error {
	upload := &uploadReader{r: &fileLimit{r: r, left: maxFileBytes}}
	content := bufio.NewReader(upload)
	if _, err := content.Peek(1); errors.Is(err, io.EOF) {
		return invalid("file", "the file %s is empty", name)
	}
	file, err := s.files.CreateFile(c.Request.Context(), name, purpose, content)
	if upload.err != nil && c.Request.Context().Err() == nil {
		return formError(upload.err) // the client's fault, not the store's
	}
	if err != nil {
		return err
	}
	return encode(c, http.StatusOK, fileToWire(file))
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
		return 0, &http.MaxBytesError{Limit: maxFileBytes}
	}
	return n, err
}

func formError(err error) error {
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		err = &http.MaxBytesError{Limit: maxFileBytes}
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return invalid("file", "the form ends before its last boundary: the upload was cut off")
	}
	return readError(err, "file")
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

func (s *Server) getFile(c *gin.Context) error {
	file, err := s.files.File(c.Request.Context(), c.Param("id"))
	if err != nil {
		return unknownFile(err, c.Param("id"))
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
	return wire.File{ID: f.ID, Object: "file", Bytes: f.Bytes, CreatedAt: f.CreatedAt, Filename: f.Filename, Purpose: f.Purpose, Status: "processed"}
}
