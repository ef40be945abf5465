package https

// For their tables and fuzzing.
var (
	EncodeBody = encodeBody
	RetryAfter = retryAfter
)
