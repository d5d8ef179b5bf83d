//go:build faults

package faults

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	fuse "github.com/hanwen/go-fuse/v2/fs"
	fuseserver "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A disk is a file system that can lose its power. It passes everything on to a directory, and keeps in memory what would
// be left of that: the data of files as they were at their last fsync, and the names of directories as they were at
// theirs. This is more than ext4 loses, whose fsync of a file saves its name too.
type disk struct {
	mount   string // where it is seen
	scratch string // has the directories that it passes on to, one for each power cut

	server *fuseserver.Server
	back   string

	mu    sync.Mutex
	files map[inode][]byte              // contents that are durable
	dirs  map[inode]map[string]dirEntry // names that are durable
	syncs int
}

// inode tells files apart, also one whose number was used by another before.
type inode struct {
	number, born uint64
}

type dirEntry struct {
	inode inode
	mode  fs.FileMode
}

// newDisk mounts an empty one. It skips the test where file systems cannot be mounted.
func newDisk(t *testing.T) *disk {
	t.Helper()
	d := &disk{mount: filepath.Join(t.TempDir(), "disk"), scratch: t.TempDir()}
	if err := os.Mkdir(d.mount, 0o700); err != nil {
		t.Fatal(err)
	}
	d.back = filepath.Join(d.scratch, "0")
	if err := os.Mkdir(d.back, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.attach(); err != nil {
		t.Skipf("a file system in user space cannot be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := d.detach(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// attach shows d.back, all of which is durable.
func (d *disk) attach() (err error) {
	d.files, d.dirs = map[inode][]byte{}, map[inode]map[string]dirEntry{}
	err = filepath.WalkDir(d.back, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			err = d.syncDir(path)
		} else if err == nil && entry.Type().IsRegular() {
			err = d.syncFile(path)
		}
		return err
	})
	if err != nil {
		return err
	}
	root := &fuse.LoopbackRoot{Path: d.back}
	top := &node{LoopbackNode: &fuse.LoopbackNode{RootData: root}, disk: d}
	root.RootNode = top
	second := time.Second
	d.server, err = fuse.Mount(d.mount, top, &fuse.Options{
		AttrTimeout: &second, EntryTimeout: &second,
		MountOptions: fuseserver.MountOptions{DirectMount: true, FsName: "powercut", Name: "powercut"},
	})
	return err
}

// detach waits until nobody has a file of the disk open.
func (d *disk) detach() error {
	if d.server == nil {
		return nil
	}
	var err error
	for range 200 {
		if err = d.server.Unmount(); err == nil {
			d.server.Wait()
			d.server = nil
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("unmount %s: %w", d.mount, err)
}

// A powerCut is what happens to that which is not durable.
type powerCut int

const (
	losesAll     powerCut = iota // names and data
	keepsNames                   // files may be empty, or have parts of what was written
	keepsSome                    // each name and each page by chance
	numPowerCuts                 // of kinds
)

func (c powerCut) String() string { return [...]string{"loses all", "keeps names", "keeps some"}[c] }

// cut is a power cut, after which the disk is there again. All processes that use it must have ended.
func (d *disk) cut(random *rand.Rand, kind powerCut) error {
	if err := d.detach(); err != nil {
		return err
	}
	after := filepath.Join(d.scratch, fmt.Sprint(random.Uint64()))
	err := d.copyDir(random, kind, d.back, identify(d.back), after)
	if err == nil {
		err = os.RemoveAll(d.back)
	}
	if err != nil {
		return fmt.Errorf("power cut: %w", err)
	}
	d.back = after
	return d.attach()
}

// copyDir makes what is left of a directory, which is live now, or "" if it was removed.
func (d *disk) copyDir(random *rand.Rand, kind powerCut, live string, id inode, to string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	names := map[string]dirEntry{}
	if kind != keepsNames {
		for name, entry := range d.dirs[id] {
			names[name] = entry
		}
	}
	now := map[string]dirEntry{}
	if live != "" {
		var err error
		if now, err = entriesOf(live); err != nil {
			return err
		}
	}
	for name, entry := range now {
		if kind == keepsNames || kind == keepsSome && random.IntN(2) == 0 {
			names[name] = entry
		}
	}
	if kind == keepsSome {
		for name := range names {
			if _, still := now[name]; !still && live != "" && random.IntN(2) == 0 {
				delete(names, name) // its removal was kept
			}
		}
	}
	for name, entry := range names {
		path := ""
		if now[name].inode == entry.inode {
			path = filepath.Join(live, name)
		}
		var err error
		switch {
		case entry.mode.IsDir():
			err = d.copyDir(random, kind, path, entry.inode, filepath.Join(to, name))
		case entry.mode.IsRegular():
			err = d.copyFile(random, kind, path, entry.inode, filepath.Join(to, name))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *disk) copyFile(random *rand.Rand, kind powerCut, live string, id inode, to string) error {
	data := d.files[id]
	if kind != losesAll && live != "" {
		written, err := os.ReadFile(live)
		if err != nil {
			return err
		}
		data = mixPages(random, data, written)
	}
	return os.WriteFile(to, data, 0o600)
}

// mixPages is the content of a file some of whose written pages have reached the disk, and whose length is the new one, the
// old one or between. The length never falls below what both have in common.
func mixPages(random *rand.Rand, synced, written []byte) []byte {
	const page = 4096
	length := len(synced)
	if grown := len(written) - len(synced); grown != 0 {
		length = []int{len(synced), len(written), len(synced) + random.IntN(max(grown, -grown))*sign(grown)}[random.IntN(3)]
	}
	mixed := make([]byte, length)
	copy(mixed, synced)
	for at := 0; at < length; at += page {
		if random.IntN(2) == 0 && at < len(written) {
			copy(mixed[at:min(at+page, length)], written[at:])
		}
	}
	return mixed
}

func sign(n int) int {
	if n < 0 {
		return -1
	}
	return 1
}

// identify is the inode of what is at path, zero if there is nothing.
func identify(path string) inode {
	var s unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_BTIME, &s); err != nil {
		return inode{}
	}
	return inode{number: s.Ino, born: uint64(s.Btime.Sec)*1e9 + uint64(s.Btime.Nsec)}
}

func entriesOf(dir string) (map[string]dirEntry, error) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	entries := map[string]dirEntry{}
	for _, entry := range list {
		if id := identify(filepath.Join(dir, entry.Name())); id != (inode{}) {
			entries[entry.Name()] = dirEntry{inode: id, mode: entry.Type()}
		}
	}
	return entries, nil
}

func (d *disk) syncDir(path string) error {
	id := identify(path)
	entries, err := entriesOf(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) { // removed while it is open
			return nil
		}
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dirs[id] = entries
	d.syncs++
	return nil
}

// syncFile saves the content of the file at path.
func (d *disk) syncFile(path string) error {
	file, err := os.Open(path) // follows /proc/self/fd/3
	if err != nil {
		return err
	}
	defer file.Close()
	var s unix.Statx_t
	if err := unix.Statx(int(file.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME|unix.STATX_SIZE, &s); err != nil {
		return err
	}
	data := make([]byte, s.Size)
	n, err := file.ReadAt(data, 0)
	if err != nil && n < len(data) && n > 0 { // it was cut meanwhile
		data = data[:n]
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.files[inode{number: s.Ino, born: uint64(s.Btime.Sec)*1e9 + uint64(s.Btime.Nsec)}] = data
	d.syncs++
	return nil
}

// node is a file or directory of a disk.
type node struct {
	*fuse.LoopbackNode
	disk *disk
}

// WrapChild makes a node of every file below.
func (n *node) WrapChild(_ context.Context, ops fuse.InodeEmbedder) fuse.InodeEmbedder {
	return &node{LoopbackNode: ops.(*fuse.LoopbackNode), disk: n.disk}
}

// Fsync is fsync and fdatasync of a file.
func (n *node) Fsync(_ context.Context, f fuse.FileHandle, _ uint32) syscall.Errno {
	open, ok := f.(fuse.FilePassthroughFder)
	if !ok {
		return syscall.EIO
	}
	fd, _ := open.PassthroughFd()
	return fuse.ToErrno(n.disk.syncFile(fmt.Sprintf("/proc/self/fd/%d", fd)))
}

// OpendirHandle opens a directory.
func (n *node) OpendirHandle(context.Context, uint32) (fuse.FileHandle, uint32, syscall.Errno) {
	stream, errno := fuse.NewLoopbackDirStream(n.path())
	if errno != 0 {
		return nil, 0, errno
	}
	return &directory{dirStream: stream.(dirStream), node: n}, 0, 0
}

func (n *node) path() string {
	return filepath.Join(n.RootData.Path, n.Path(n.RootData.RootNode.EmbeddedInode()))
}

// dirStream is what the open directory of a loopback can do.
type dirStream interface {
	fuse.FileReaddirenter
	fuse.FileReleasedirer
	fuse.FileSeekdirer
}

// directory is an open directory.
type directory struct {
	dirStream
	node *node
}

// Fsyncdir is fsync of a directory.
func (d *directory) Fsyncdir(context.Context, uint32) syscall.Errno {
	return fuse.ToErrno(d.node.disk.syncDir(d.node.path()))
}

// TestPowerCutDisk tries the disk itself: what is synced stays, and what is not goes.
func TestPowerCutDisk(t *testing.T) {
	d := newDisk(t)
	write := func(name, content string, sync bool) {
		t.Helper()
		file, err := os.Create(filepath.Join(d.mount, name))
		if err == nil {
			_, err = file.WriteString(content)
		}
		if err == nil && sync {
			err = file.Sync()
		}
		if err = errors.Join(err, file.Close()); err != nil {
			t.Fatal(err)
		}
	}
	syncDir := func(name string) {
		t.Helper()
		dir, err := os.Open(filepath.Join(d.mount, name))
		if err = errors.Join(err, dir.Sync(), dir.Close()); err != nil {
			t.Fatal(err)
		}
	}
	write("both", "content", true)
	write("name alone", "content", false)
	if err := os.Mkdir(filepath.Join(d.mount, "dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	syncDir(".")
	write("dir/data alone", "content", true)
	write("data alone", "content", true)
	if err := os.Rename(filepath.Join(d.mount, "both"), filepath.Join(d.mount, "renamed")); err != nil {
		t.Fatal(err)
	}
	if err := d.cut(random(t), losesAll); err != nil {
		t.Fatal(err)
	}
	var got []string
	err := filepath.WalkDir(d.mount, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			data, _ := os.ReadFile(path)
			got = append(got, strings.TrimPrefix(path, d.mount)+"="+string(data))
		} else if err == nil {
			got = append(got, strings.TrimPrefix(path, d.mount))
		}
		return err
	})
	if want := ", /both=content, /dir, /name alone="; err != nil || strings.Join(got, ", ") != want {
		t.Errorf("after the cut %q, %v; want %q", strings.Join(got, ", "), err, want)
	}
}
