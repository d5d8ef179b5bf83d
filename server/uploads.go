package server

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

// Limits of an upload in parts.
const (
	maxPartBytes   = 64 << 20
	maxUploadBytes = 8 << 30
)

// createUpload answers POST /v1/uploads.
func (s *Server) createUpload(c *gin.Context) error {
	var req wire.UploadRequest
	if err := decode(c, &req); err != nil {
		return err
	}
	if req.Filename == "" {
		return invalid("filename", "filename is required")
	}
	name, err := filename(req.Filename)
	if err != nil {
		return invalid("filename", "filename is %.40q, expected the name of a file, of at most %d bytes", req.Filename, maxFilenameBytes)
	}
	if err := checkEnding("filename", name); err != nil {
		return err
	}
	if err := checkPurpose(req.Purpose); err != nil {
		return err
	}
	if req.Bytes < 1 || req.Bytes > maxUploadBytes {
		return invalid("bytes", "bytes is %d, expected 1 to %d (8 GiB)", req.Bytes, int64(maxUploadBytes))
	}
	if _, _, err := mime.ParseMediaType(req.MimeType); err != nil || !strings.Contains(req.MimeType, "/") {
		return invalid("mime_type", "mime_type is %.80q, expected the media type of the file, such as text/jsonl", req.MimeType)
	}
	lifetime, err := lifetimeOf("expires_after", req.ExpiresAfter)
	if err != nil {
		return err
	}
	ctx, done, err := s.once(c, s.showUpload)
	if done || err != nil {
		return err
	}
	if err := s.files.CheckSpace(2 * req.Bytes); err != nil { // the parts, then the file
		return err
	}
	upload, err := s.files.CreateUpload(ctx, store.Upload{
		Filename: name, Purpose: req.Purpose, MimeType: req.MimeType, Bytes: req.Bytes, Lifetime: lifetime,
	})
	if err != nil {
		return err
	}
	return encode(c, http.StatusOK, uploadToWire(upload, nil))
}

// createPart answers POST /v1/uploads/{id}/parts. A part may be sent again, and any of the parts left out when the upload is
// completed, so all parts together may be longer than the file, but not without end.
func (s *Server) createPart(c *gin.Context) error {
	id := c.Param("id")
	upload, err := s.files.Upload(c.Request.Context(), id)
	if err != nil {
		return unknownUpload(err, id)
	}
	if upload.Status != store.UploadPending {
		return invalid("", "the upload %s is %s; only a pending one takes parts", id, upload.Status)
	}
	sent, err := s.files.PartBytes(c.Request.Context(), id)
	if err != nil {
		return err
	}
	if most := 2*upload.Bytes + maxPartBytes; sent > most {
		return invalid("data", "the parts of the upload %s have %d bytes already, and it was created for %d", id, sent, upload.Bytes)
	}
	form, err := s.readForm(c, "data", maxPartBytes, func(string, string) error { return nil }, func(r io.Reader) io.Reader { return r })
	if err != nil {
		return err
	}
	if form.blob == nil {
		return invalid("data", "the form has no field named data")
	}
	defer func() { _ = s.files.Discard(form.blob) }() // at the latest the next start removes it
	if form.blob.Bytes() == 0 {
		return invalid("data", "the part is empty")
	}
	ctx, done, err := s.once(c, s.showPart)
	if done || err != nil {
		return err
	}
	part, err := s.files.AddPart(ctx, id, form.blob)
	if err != nil {
		return unknownUpload(err, id)
	}
	return encode(c, http.StatusOK, partToWire(part))
}

func (s *Server) showPart(c *gin.Context, id string) error {
	part, err := s.files.Part(c.Request.Context(), id)
	if err != nil {
		return err
	}
	return encode(c, http.StatusOK, partToWire(part))
}

func partToWire(p store.UploadPart) wire.UploadPart {
	return wire.UploadPart{ID: p.ID, Object: "upload.part", CreatedAt: p.CreatedAt, UploadID: p.UploadID}
}

// completeUpload answers POST /v1/uploads/{id}/complete.
func (s *Server) completeUpload(c *gin.Context) error {
	var req wire.CompleteUploadRequest
	if err := decode(c, &req); err != nil {
		return err
	}
	if len(req.PartIDs) == 0 {
		return invalid("part_ids", "part_ids is required: the ids of the parts, in the order of the file")
	}
	var sum string
	if req.MD5 != nil {
		if sum = *req.MD5; len(sum) != 32 || strings.Trim(strings.ToLower(sum), "0123456789abcdef") != "" {
			return invalid("md5", "md5 is %.40q, expected 32 hexadecimal digits", sum)
		}
	}
	ctx, done, err := s.once(c, s.showUpload)
	if done || err != nil {
		return err
	}
	id := c.Param("id")
	upload, file, err := s.files.CompleteUpload(ctx, id, req.PartIDs, sum)
	if err != nil {
		return unknownUpload(err, id)
	}
	return encode(c, http.StatusOK, uploadToWire(upload, new(fileToWire(file))))
}

// showUpload answers an upload, with its file where it has one that is still there.
func (s *Server) showUpload(c *gin.Context, id string) error {
	upload, err := s.files.Upload(c.Request.Context(), id)
	if err != nil {
		return unknownUpload(err, id)
	}
	var shown *wire.File
	if upload.FileID != "" {
		file, err := s.files.File(c.Request.Context(), upload.FileID)
		if err == nil {
			shown = new(fileToWire(file))
		} else if !errors.Is(err, store.ErrNotFound) {
			return err
		}
	}
	return encode(c, http.StatusOK, uploadToWire(upload, shown))
}

// cancelUpload answers POST /v1/uploads/{id}/cancel.
func (s *Server) cancelUpload(c *gin.Context) error {
	upload, err := s.files.CancelUpload(c.Request.Context(), c.Param("id"))
	if err != nil {
		return unknownUpload(err, c.Param("id"))
	}
	return encode(c, http.StatusOK, uploadToWire(upload, nil))
}

func unknownUpload(err error, id string) error {
	if refused := new(store.UploadError); errors.As(err, &refused) {
		return invalid(refused.Param, "%s", refused.Message)
	}
	if !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return &wire.Error{Status: http.StatusNotFound, Type: wire.ErrorTypeInvalidRequest, Param: new("id"), Code: new("not_found"),
		Message: fmt.Sprintf("the upload %q does not exist", id)}
}

func uploadToWire(u store.Upload, file *wire.File) wire.Upload {
	return wire.Upload{
		ID: u.ID, Object: "upload", Bytes: u.Bytes, CreatedAt: u.CreatedAt, Filename: u.Filename, Purpose: u.Purpose, Status: u.Status,
		ExpiresAt: u.ExpiresAt, File: file,
	}
}
