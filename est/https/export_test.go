package https

// For their tables and fuzzing.
var (
	EncodeBody = encodeBody
	ReadBody   = readBody
	RetryAfter = retryAfter
)
