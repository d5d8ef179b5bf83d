package wire

// File is an uploaded file or a job's result file.
type File struct {
	ID            string  `json:"id"` // file-...
	Object        string  `json:"object"`
	Bytes         int64   `json:"bytes"`
	CreatedAt     int64   `json:"created_at"`
	ExpiresAt     *int64  `json:"expires_at,omitempty"`
	Filename      string  `json:"filename"`
	Purpose       string  `json:"purpose"`
	Status        string  `json:"status"` // processed, which OpenAI's clients wait for; error if the content was lost
	StatusDetails *string `json:"status_details,omitempty"`
}

// ExpiresAfter says when a file is deleted: so many seconds after Anchor, which is created_at.
type ExpiresAfter struct {
	Anchor  string `json:"anchor"`
	Seconds int64  `json:"seconds"` // 3600 to 2592000
}

// UploadRequest is the body of POST /v1/uploads.
type UploadRequest struct {
	Filename     string        `json:"filename"`
	Purpose      string        `json:"purpose"`
	Bytes        int64         `json:"bytes"` // of all parts together
	MimeType     string        `json:"mime_type"`
	ExpiresAfter *ExpiresAfter `json:"expires_after,omitempty"` // of the file
}

// Upload is a file that comes in parts.
type Upload struct {
	ID        string `json:"id"` // upload_...
	Object    string `json:"object"`
	Bytes     int64  `json:"bytes"`
	CreatedAt int64  `json:"created_at"`
	Filename  string `json:"filename"`
	Purpose   string `json:"purpose"`
	Status    string `json:"status"`     // pending, completed, cancelled, expired
	ExpiresAt int64  `json:"expires_at"` // until when it may be pending
	File      *File  `json:"file"`       // of a completed one
}

// UploadPart is a part of an upload.
type UploadPart struct {
	ID        string `json:"id"` // part_...
	Object    string `json:"object"`
	CreatedAt int64  `json:"created_at"`
	UploadID  string `json:"upload_id"`
}

// CompleteUploadRequest is the body of POST /v1/uploads/{id}/complete.
type CompleteUploadRequest struct {
	PartIDs []string `json:"part_ids"` // in the order of the file
	MD5     *string  `json:"md5,omitempty"`
}
