package models

import (
	"context"
	"io/fs"
	"net/http"
	"path/filepath"
)

// Reach asks the hub for the head of its first page, and returns the endpoint that it asked. Any answer below 500, also
// one that wants a login, is a hub that can be reached.
func (c *Cache) Reach(ctx context.Context) (endpoint string, err error) {
	resp, err := c.hub.get(ctx, http.MethodHead, c.hub.endpoint, 0, maxRedirects)
	if err != nil {
		return c.hub.endpoint.String(), err
	}
	resp.Body.Close()
	if resp.StatusCode >= 500 {
		err = c.hub.statusError(resp)
	}
	return c.hub.endpoint.String(), err
}

// Pip is the command that fetches Python packages, the one that Fetch uses, or an error that says how to get it.
func (c *Cache) Pip(ctx context.Context) ([]string, error) {
	if c.pip != nil {
		return c.pip, nil
	}
	return findPip(ctx)
}

// Check compares source's file in the cache with its sha256. It returns fs.ErrNotExist if there is none, also for a source
// without a sha256, which is not kept.
func (c *Cache) Check(ctx context.Context, source Source) (path string, err error) {
	path = filepath.Join(c.dir, filepath.FromSlash(source.cachePath()))
	if !source.keep() {
		return path, fs.ErrNotExist
	}
	return path, c.check(ctx, path, source)
}

// Check compares the weights with the digest in the manifest. It returns a *DigestError if they differ.
func (m Model) Check(ctx context.Context) error {
	got, err := fileDigest(ctx, m.Weights())
	if err != nil {
		return err
	}
	if got != m.Digest {
		return &DigestError{File: m.Weights(), Want: m.Digest, Got: got}
	}
	return nil
}
