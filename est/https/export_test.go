package https

// The parsers of what a server sends, for their tables and fuzzing.
var (
	DecodeBody = decodeBody
	EncodeBody = encodeBody
	RetryAfter = retryAfter
)
