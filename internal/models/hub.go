package models

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	defaultEndpoint = "https://huggingface.co"
	maxRedirects    = 5
	maxFileBytes    = 1 << 40
	// maxFailures is how often in a row a download may break without a byte of progress.
	maxFailures = 4
)

// hub is a Hugging Face hub.
type hub struct {
	endpoint *url.URL
	token    string
	client   *http.Client
	stall    time.Duration // a download that brings nothing for so long is asked for again
	pause    time.Duration // before the first retry; it doubles
}

func newHub(endpoint, token string) (*hub, error) {
	if endpoint == "" {
		endpoint = defaultEndpoint
	}
	u, err := url.Parse(strings.TrimRight(endpoint, "/"))
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, fmt.Errorf("HF_ENDPOINT is %q, expected a URL such as %s", endpoint, defaultEndpoint)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	// Short, since offline the package is asked next: with name look-up, 5 s each.
	transport.DialContext = (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext
	transport.TLSHandshakeTimeout = 5 * time.Second
	transport.ResponseHeaderTimeout = 30 * time.Second
	transport.DisableCompression = true // offsets are those of the file
	return &hub{
		endpoint: u,
		token:    token,
		client: &http.Client{
			Transport: transport,
			// Redirects are followed by get, which says where the token may go.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		stall: 30 * time.Second,
		pause: time.Second,
	}, nil
}

// permanentError is an answer that asking again does not change.
type permanentError struct{ error }

func (e permanentError) Unwrap() error { return e.error }

func permanent(format string, args ...any) error { return permanentError{fmt.Errorf(format, args...)} }

// fetch downloads source's file to path and returns its sha256. The part that arrived lies beside path in a file
// named after the digest, so that a later fetch continues only what is the same file.
func (h *hub) fetch(ctx context.Context, source Source, path string, progress Progress) (digest string, err error) {
	u := h.endpoint.JoinPath(source.Repo, "resolve", source.Revision, source.File) // #nosec G125 -- ParseSource takes no part of a path that leads out
	digest, size, err := h.describe(ctx, u)
	if err != nil {
		return "", err
	}
	if source.SHA256 != "" && digest != source.SHA256 {
		return "", &DigestError{File: "the hub's file", Want: source.SHA256, Got: digest}
	}
	if have, err := fileDigest(ctx, path); err == nil && have == digest { // of a pull that ended before its model was made
		return digest, nil
	}
	part, err := os.OpenFile(path+"."+digest[:12]+".partial", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return "", err
	}
	defer part.Close()
	d := &download{hub: h, url: u, file: part, size: size, hash: sha256.New(), progress: progress}
	if err := d.resume(ctx); err != nil {
		return "", err
	}
	resumed := d.done > 0
	for {
		if err := d.run(ctx); err != nil {
			return "", err
		}
		got := hex.EncodeToString(d.hash.Sum(nil))
		if got == digest {
			return digest, publish(part, path)
		}
		if err := d.restart(); err != nil {
			return "", err
		}
		if !resumed {
			return "", &DigestError{File: "what the hub sent", Want: digest, Got: got}
		}
		resumed = false // what was there may have been the damaged part
	}
}

// hexDigest is the shape of a sha256; it also becomes part of a file name.
var hexDigest = regexp.MustCompile(`^[0-9a-f]{64}$`)

// describe asks for a file's sha256 and size without downloading it. For files in large file storage, as all GGUF files
// are, the hub itself (not the storage that it redirects to) sends both in X-Linked-Etag and X-Linked-Size.
func (h *hub) describe(ctx context.Context, u *url.URL) (digest string, size int64, err error) {
	var resp *http.Response
	for range maxRedirects {
		if resp, err = h.get(ctx, http.MethodHead, u, 0, 0); err != nil {
			return "", 0, err
		}
		resp.Body.Close()
		if resp.StatusCode >= 400 {
			return "", 0, h.statusError(resp)
		}
		// A repository that was renamed redirects within the hub; the storage's host would not send the digest.
		next, err := u.Parse(resp.Header.Get("Location"))
		if resp.Header.Get("X-Linked-Etag") != "" || err != nil || next.Host != u.Host || next.Scheme != u.Scheme {
			break
		}
		u = next
	}
	digest = strings.Trim(strings.TrimPrefix(resp.Header.Get("X-Linked-Etag"), "W/"), `"`)
	size, err = strconv.ParseInt(resp.Header.Get("X-Linked-Size"), 10, 64)
	if !hexDigest.MatchString(digest) || err != nil || size < 1 || size > maxFileBytes {
		return "", 0, permanent("the hub answered %s without the file's sha256 and size (X-Linked-Etag, X-Linked-Size)", resp.Status)
	}
	return digest, size, nil
}

// get sends a request, with a Range if offset is not 0, following at most redirects redirects. The token goes to the
// endpoint's own host only, and https never becomes http.
func (h *hub) get(ctx context.Context, method string, u *url.URL, offset int64, redirects int) (*http.Response, error) {
	for hop := 0; ; hop++ {
		req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("User-Agent", "hone")
		if offset > 0 {
			req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		}
		if h.token != "" && u.Host == h.endpoint.Host && u.Scheme == h.endpoint.Scheme {
			req.Header.Set("Authorization", "Bearer "+h.token)
		}
		resp, err := h.client.Do(req)
		if err != nil {
			// The address is long, signed on the storage's host, and no news.
			if withURL, ok := errors.AsType[*url.Error](err); ok {
				err = withURL.Err
			}
			return nil, err
		}
		location := resp.Header.Get("Location")
		if resp.StatusCode < 300 || resp.StatusCode >= 400 || location == "" || redirects == 0 {
			return resp, nil
		}
		resp.Body.Close()
		if hop == redirects {
			return nil, permanent("the hub redirected more than %d times", redirects)
		}
		next, err := u.Parse(location)
		if err != nil {
			return nil, permanent("the hub redirected to %q: %w", location, err)
		}
		if next.Scheme != "https" && next.Scheme != u.Scheme {
			return nil, permanent("the hub redirected from %s to %s, which is refused", u.Scheme, next.Scheme)
		}
		u = next
	}
}

func (h *hub) statusError(resp *http.Response) error {
	switch resp.StatusCode {
	case http.StatusNotFound:
		return permanent("the hub has no such repository or file (404)")
	case http.StatusUnauthorized, http.StatusForbidden:
		return permanent("the hub answered %s: the repository needs a token in HF_TOKEN, and perhaps that you accept its "+
			"licence on its page (or there is no such repository)", resp.Status)
	case http.StatusRequestTimeout, http.StatusTooManyRequests:
		return fmt.Errorf("the hub answered %s", resp.Status)
	}
	if resp.StatusCode < 500 {
		return permanent("the hub answered %s", resp.Status)
	}
	return fmt.Errorf("the hub answered %s", resp.Status)
}

// download is one file on its way. done bytes are in file and in hash.
type download struct {
	hub      *hub
	url      *url.URL
	file     *os.File
	size     int64
	done     int64
	hash     hash.Hash
	progress Progress
}

// resume takes up what an earlier download left.
func (d *download) resume(ctx context.Context) error {
	info, err := d.file.Stat()
	if err != nil {
		return err
	}
	if info.Size() > d.size {
		return d.restart()
	}
	if _, err := hashOf(ctx, d.file, d.hash, d.size, func(int64, int64) {}); err != nil {
		return err
	}
	d.done = info.Size()
	d.progress(d.done, d.size)
	return nil
}

// restart forgets what is there.
func (d *download) restart() error {
	if err := d.file.Truncate(0); err != nil {
		return err
	}
	if _, err := d.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	d.hash.Reset()
	d.done = 0
	return nil
}

// run downloads until size bytes are there, asking again where a connection breaks or stalls.
func (d *download) run(ctx context.Context) error {
	failures := 0
	for d.done < d.size {
		before := d.done
		err := d.once(ctx)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.As(err, new(permanentError)) {
			return err
		}
		if d.done > before {
			failures = 0
		}
		if failures++; failures > maxFailures {
			return fmt.Errorf("the download broke %d times at byte %d of %d: %w", failures, d.done, d.size, err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(d.hub.pause << (failures - 1)):
		}
	}
	return nil
}

var errStalled = errors.New("nothing arrived for too long")

// once sends one request for what is missing and stores what arrives. It returns nil if all did.
func (d *download) once(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(d.hub.stall, func() { cancel(errStalled) })
	defer stalled.Stop()

	resp, err := d.hub.get(ctx, http.MethodGet, d.url, d.done, maxRedirects)
	if err != nil {
		return stallOr(ctx, err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK: // also the answer of a server without ranges
		if err := d.restart(); err != nil {
			return permanentError{err}
		}
	case http.StatusPartialContent:
		if want := fmt.Sprintf("bytes %d-%d/%d", d.done, d.size-1, d.size); resp.Header.Get("Content-Range") != want {
			return permanent("the hub sent the range %q, expected %q", resp.Header.Get("Content-Range"), want)
		}
	case http.StatusRequestedRangeNotSatisfiable:
		if err := d.restart(); err != nil {
			return permanentError{err}
		}
		return errors.New("the hub refused to continue the download (416)")
	default:
		return d.hub.statusError(resp)
	}
	if resp.ContentLength >= 0 && resp.ContentLength != d.size-d.done {
		return permanent("the hub sends %d bytes, expected %d", resp.ContentLength, d.size-d.done)
	}
	buf := make([]byte, 256<<10)
	for d.done < d.size {
		n, err := resp.Body.Read(buf[:min(int64(len(buf)), d.size-d.done)])
		stalled.Reset(d.hub.stall)
		if n > 0 {
			if _, err := d.file.Write(buf[:n]); err != nil {
				return permanentError{err} // the disk's fault, not the connection's
			}
			d.hash.Write(buf[:n])
			d.done += int64(n)
			d.progress(d.done, d.size)
		}
		if err != nil && d.done < d.size {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return stallOr(ctx, err)
		}
	}
	return nil
}

// stallOr names a stall as the reason, instead of the cancelled context that it shows as.
func stallOr(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}
