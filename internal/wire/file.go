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
	Status        string  `json:"status"` // processed: OpenAI's clients wait for it
	StatusDetails *string `json:"status_details,omitempty"`
}
