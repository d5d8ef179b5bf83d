package dataset

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path/filepath"
	"time"

	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/prompt"
)

// A tokenized file is
//
//	header   magic, version, key
//	records  one for each example (appendExample)
//	index    uint64 [rows+1]: where each record begins, and where the last ends
//	summary  JSON
//	footer   uint64 where the index begins, uint64 rows, uint32 CRC-32C of all before it
//
// with numbers in little-endian order. It gets its name when all of it is on disk, so a file with its name that is
// not whole was damaged later; the checksum tells.
const (
	cacheMagic = "honerows"
	// cacheVersion changes with the format of the file, and with what becomes of a row.
	cacheVersion = 2
	headerBytes  = len(cacheMagic) + 4 + sha256.Size
	footerBytes  = 8 + 8 + 4
	// staleAfter is when a temporary file belongs to no process any more: a living one writes all the time.
	staleAfter = time.Hour
)

var errDamaged = errors.New("the tokenized file is damaged")

// cacheKey names a tokenized file by all that decides its content.
type cacheKey [sha256.Size]byte

func keyOf(f *os.File, builder *prompt.Builder, o Options) (cacheKey, error) {
	content := sha256.New()
	if _, err := io.Copy(content, f); err != nil {
		return cacheKey{}, fmt.Errorf("dataset: %w", err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return cacheKey{}, fmt.Errorf("dataset: %w", err)
	}
	digest, err := builder.Digest()
	if err != nil {
		return cacheKey{}, err
	}
	o.CacheDir, o.Progress = "", nil
	key := fmt.Sprintf("%d %x %s %d %v %v %v %q", cacheVersion, content.Sum(nil), digest, o.MaxLength, o.Truncate, o.TrainOnAll, o.DPO, o.Choices)
	return sha256.Sum256([]byte(key)), nil
}

func cachePath(dir string, key cacheKey) string {
	return filepath.Join(dir, fmt.Sprintf("%x.rows", key[:16]))
}

// writer makes a tokenized file.
type writer struct {
	summary Summary
	path    string // "": the file has no name
	file    *os.File
	sum     hash.Hash32
	out     *bufio.Writer // to file and sum
	at      uint64
	index   []uint64
}

func newWriter(path string, key cacheKey) (*writer, error) {
	w := &writer{path: path, sum: crc32.New(crc32.MakeTable(crc32.Castagnoli))}
	var err error
	if path == "" {
		if w.file, err = os.CreateTemp("", "hone-rows-*"); err == nil {
			err = os.Remove(w.file.Name()) // the open file stays, and goes with the process however that ends
		}
	} else if err = os.MkdirAll(filepath.Dir(path), 0o700); err == nil {
		removeStale(path)
		w.file, err = os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-*")
	}
	if err != nil {
		w.discard()
		return nil, fmt.Errorf("dataset: write the tokenized rows: %w", err)
	}
	w.out = bufio.NewWriterSize(io.MultiWriter(w.file, w.sum), 1<<20)
	header := binary.LittleEndian.AppendUint32([]byte(cacheMagic), cacheVersion)
	w.index = []uint64{uint64(headerBytes)}
	return w, w.write(append(header, key[:]...))
}

// removeStale removes what processes that were killed have left.
func removeStale(path string) {
	left, _ := filepath.Glob(path + ".tmp-*")
	for _, name := range left {
		if info, err := os.Stat(name); err == nil && time.Since(info.ModTime()) > staleAfter {
			os.Remove(name)
		}
	}
}

func (w *writer) write(data []byte) error {
	w.at += uint64(len(data))
	if _, err := w.out.Write(data); err != nil {
		return fmt.Errorf("dataset: write the tokenized rows: %w", err)
	}
	return nil
}

// add appends records of the given lengths.
func (w *writer) add(records []byte, lengths []int) error {
	last := w.index[len(w.index)-1]
	for _, n := range lengths {
		last += uint64(n)
		w.index = append(w.index, last)
	}
	return w.write(records)
}

// finish makes the file whole, gives it its name and opens it.
func (w *writer) finish() (*Dataset, error) {
	summary, err := json.Marshal(w.summary)
	if err == nil {
		err = w.complete(summary)
	}
	if err != nil {
		w.discard()
		return nil, fmt.Errorf("dataset: write the tokenized rows: %w", err)
	}
	return &Dataset{Summary: w.summary, file: w.file, index: w.index}, nil
}

func (w *writer) complete(summary []byte) error {
	begin := w.at
	var number [8]byte
	for _, offset := range w.index {
		binary.LittleEndian.PutUint64(number[:], offset)
		if err := w.write(number[:]); err != nil {
			return err
		}
	}
	footer := binary.LittleEndian.AppendUint64(summary, begin)
	footer = binary.LittleEndian.AppendUint64(footer, uint64(len(w.index)-1))
	if err := w.write(footer); err != nil {
		return err
	}
	if err := w.out.Flush(); err != nil {
		return err
	}
	if _, err := w.file.Write(binary.LittleEndian.AppendUint32(nil, w.sum.Sum32())); err != nil {
		return err
	}
	if w.path == "" {
		return nil
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	if err := os.Rename(w.file.Name(), w.path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(w.path))
}

func (w *writer) discard() {
	if w.file == nil {
		return
	}
	w.file.Close()
	if w.path != "" {
		os.Remove(w.file.Name())
	}
}

// openCache opens a tokenized file if it is whole and has this key.
func openCache(path string, key cacheKey) (*Dataset, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	d, err := readCache(f, key)
	if err != nil {
		f.Close()
		return nil, err
	}
	// The server removes what was used longest ago; if the time cannot be set, that is earlier than it should.
	now := time.Now()
	_ = os.Chtimes(path, now, now)
	return d, nil
}

func readCache(f *os.File, key cacheKey) (*Dataset, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	size := info.Size()
	if size < int64(headerBytes+footerBytes) {
		return nil, errDamaged
	}
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	if _, err := io.CopyBuffer(sum, io.NewSectionReader(f, 0, size-4), make([]byte, 1<<20)); err != nil {
		return nil, err
	}
	header, footer := make([]byte, headerBytes), make([]byte, footerBytes)
	if _, err := f.ReadAt(header, 0); err != nil {
		return nil, err
	}
	if _, err := f.ReadAt(footer, size-int64(footerBytes)); err != nil {
		return nil, err
	}
	want := append(binary.LittleEndian.AppendUint32([]byte(cacheMagic), cacheVersion), key[:]...)
	if string(header) != string(want) || binary.LittleEndian.Uint32(footer[16:]) != sum.Sum32() {
		return nil, errDamaged
	}
	begin, rows := binary.LittleEndian.Uint64(footer), binary.LittleEndian.Uint64(footer[8:])
	end := uint64(size) - uint64(footerBytes)
	if rows > end/8 || begin < uint64(headerBytes) || begin > end || 8*(rows+1) > end-begin {
		return nil, errDamaged
	}
	rest := bufio.NewReaderSize(io.NewSectionReader(f, int64(begin), int64(end-begin)), 1<<20)
	d := &Dataset{file: f, index: make([]uint64, rows+1)}
	for i := range d.index {
		var number [8]byte
		if _, err := io.ReadFull(rest, number[:]); err != nil {
			return nil, err
		}
		d.index[i] = binary.LittleEndian.Uint64(number[:])
		if d.index[i] > begin || i > 0 && d.index[i] < d.index[i-1] {
			return nil, errDamaged
		}
	}
	if err := json.NewDecoder(rest).Decode(&d.Summary); err != nil || uint64(d.Rows) != rows {
		return nil, errDamaged
	}
	return d, nil
}

// appendExample appends an example's record: uvarints of the number of candidates, Right, Tokens and the length of the
// candidates' common prefix, the prefix, and for each candidate how many tokens follow, these, and its weights in runs
// of a length and a float32.
func appendExample(to []byte, e Example) []byte {
	prefix := len(e.Candidates[0].Tokens)
	for _, c := range e.Candidates[1:] {
		prefix = min(prefix, common(e.Candidates[0].Tokens, c.Tokens))
	}
	for _, n := range []int{len(e.Candidates), e.Right, e.Tokens, prefix} {
		to = binary.AppendUvarint(to, uint64(n))
	}
	tokens := func(tokens []engine.Token) {
		for _, t := range tokens {
			to = binary.AppendUvarint(to, uint64(uint32(t)))
		}
	}
	tokens(e.Candidates[0].Tokens[:prefix])
	for _, c := range e.Candidates {
		to = binary.AppendUvarint(to, uint64(len(c.Tokens)-prefix))
		tokens(c.Tokens[prefix:])
		for i := 0; i < len(c.Weights); {
			start := i
			for i < len(c.Weights) && c.Weights[i] == c.Weights[start] {
				i++
			}
			to = binary.AppendUvarint(to, uint64(i-start))
			to = binary.LittleEndian.AppendUint32(to, math.Float32bits(c.Weights[start]))
		}
	}
	return to
}

// decodeExample reads what appendExample wrote.
func decodeExample(record []byte) (Example, error) {
	damaged := false
	number := func(limit int) int {
		v, n := binary.Uvarint(record)
		if n <= 0 || v > uint64(limit) {
			damaged, record = true, nil
			return 0
		}
		record = record[n:]
		return int(v)
	}
	tokens := func(into []engine.Token) {
		for i := range into {
			into[i] = engine.Token(number(math.MaxInt32))
		}
	}
	candidates := number(len(record))
	e := Example{Right: number(candidates), Tokens: number(math.MaxInt32)}
	prefix := make([]engine.Token, number(len(record)))
	tokens(prefix)
	for range candidates {
		rest := number(len(record))
		c := prompt.Row{Tokens: make([]engine.Token, len(prefix)+rest)}
		tokens(c.Tokens[copy(c.Tokens, prefix):])
		c.Weights = make([]float32, 0, len(c.Tokens))
		for len(c.Weights) < len(c.Tokens) && !damaged {
			run := number(len(c.Tokens) - len(c.Weights))
			if run == 0 || len(record) < 4 {
				damaged = true
				break
			}
			weight := math.Float32frombits(binary.LittleEndian.Uint32(record))
			record = record[4:]
			for range run {
				c.Weights = append(c.Weights, weight)
			}
		}
		e.Candidates = append(e.Candidates, c)
	}
	if damaged || len(record) != 0 || e.Right >= len(e.Candidates) {
		return Example{}, errDamaged
	}
	return e, nil
}

// common is the length of the longest common prefix.
func common(a, b []engine.Token) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}
