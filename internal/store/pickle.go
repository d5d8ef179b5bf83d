package store

import (
	"bytes"
	"errors"
	"io"
)

// ErrPickle is returned for content that is pickled, or an archive of pickled weights: programs that read it run what it says.
var ErrPickle = errors.New("the content is pickled, which is code for whoever reads it: nothing here needs it; weights are added as GGUF or safetensors with hone models add")

// NotPickled reads from r, and ends with ErrPickle if that is a pickle (of a binary protocol, 2 to 5) or a zip archive with a
// data.pkl, as PyTorch writes them. It reads on while it looks, and keeps next to nothing.
func NotPickled(r io.Reader) io.Reader { return &pickleReader{r: r} }

type pickleReader struct {
	r    io.Reader
	head []byte // the first bytes
	last []byte // the end of what was read, as long as the archive's name less one
}

var (
	zipMagic  = []byte("PK\x03\x04")
	pickleZip = []byte("data.pkl") // stands uncompressed before the member and in the archive's directory
)

func (p *pickleReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	if len(p.head) < len(zipMagic) {
		p.head = append(p.head, b[:min(n, len(zipMagic)-len(p.head))]...)
	}
	if len(p.head) >= 2 && p.head[0] == 0x80 && p.head[1] >= 2 && p.head[1] <= 5 {
		return 0, ErrPickle
	}
	if !bytes.HasPrefix(zipMagic, p.head) {
		return n, err
	}
	seam := append(p.last, b[:min(n, len(pickleZip)-1)]...)
	if bytes.Contains(seam, pickleZip) || bytes.Contains(b[:n], pickleZip) {
		return 0, ErrPickle
	}
	if n >= len(pickleZip)-1 {
		seam = b[:n]
	}
	p.last = bytes.Clone(seam[max(0, len(seam)-len(pickleZip)+1):])
	return n, err
}
