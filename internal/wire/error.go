package wire

// ErrorResponse is the body of every answer that is not a success, and the data of a stream's error event.
// go-openai recognises an error in a stream only if "error" is the first key and no space follows the brace.
type ErrorResponse struct {
	Error *Error `json:"error"`
}

// Error is OpenAI's error object. All four keys are always written.
type Error struct {
	Status  int     `json:"-"` // HTTP status
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"` // the request's field, if one is to blame
	Code    *string `json:"code"`

	RetryAfter int `json:"-"` // seconds, of the header Retry-After; 0: none
}

func (e *Error) Error() string { return e.Message }

// Types of Error.
const (
	ErrorTypeInvalidRequest = "invalid_request_error"
	ErrorTypeServer         = "server_error"
	ErrorTypeRateLimit      = "rate_limit_error"
)
