package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// PCI numbers of vendors, and the class of displays and 3D controllers.
const (
	vendorNVIDIA = "0x10de"
	vendorAMD    = "0x1002"
	classDisplay = "0x03"
)

// graphics counts the GPUs of a vendor on the PCI bus, with a driver or without.
func (o *Options) graphics(vendor string) int {
	n := 0
	classes, _ := filepath.Glob(o.path("sys/bus/pci/devices/*/class")) // the pattern is right
	for _, path := range classes {
		class, err := os.ReadFile(path)
		if err != nil || !strings.HasPrefix(string(class), classDisplay) {
			continue
		}
		if v, err := os.ReadFile(filepath.Join(filepath.Dir(path), "vendor")); err == nil && strings.TrimSpace(string(v)) == vendor {
			n++
		}
	}
	return n
}

var driverVersion = regexp.MustCompile(`\b\d{3,}\.\d+(\.\d+)?\b`)

// driver is the version of NVIDIA's kernel module, "" if it is not loaded.
func (o *Options) driver() string {
	data, err := os.ReadFile(o.path("proc/driver/nvidia/version"))
	if err != nil {
		return ""
	}
	if version := driverVersion.FindString(string(data)); version != "" {
		return version
	}
	return "of unknown version"
}

// gpu says which GPUs are used, or at which of the steps from the bus to the library it ends.
func (o *Options) gpu(e Engine, engineErr error) Check {
	warn := func(found, fix string) Check { return Check{"GPU", Warning, found, fix} }
	driver := o.driver()
	nodes, _ := filepath.Glob(o.path("dev/nvidia[0-9]*"))
	onBus := o.graphics(vendorNVIDIA)
	windows := o.exists("dev/dxg") // WSL2: the driver is Windows'
	named := "the NVIDIA GPU"
	if driver != "" {
		named += " (driver " + driver + ")"
	}
	switch {
	case len(e.GPUs) > 0:
		var list []string
		for _, g := range e.GPUs {
			list = append(list, fmt.Sprintf("%s, %s free of %s", g.Name, size(g.FreeBytes), size(g.MemoryBytes)))
		}
		found := strings.Join(list, "; ")
		if driver != "" {
			found += "; driver " + driver
		}
		return Check{"GPU", OK, found, ""}
	case onBus == 0 && driver == "" && len(nodes) == 0 && !windows:
		if o.graphics(vendorAMD) > 0 {
			return Check{"GPU", OK, "an AMD GPU, which hone does not use: it uses NVIDIA's only", ""}
		}
		return Check{"GPU", OK, "none", ""}
	case driver == "" && len(nodes) == 0 && !windows:
		return warn("an NVIDIA GPU without a driver is not used: /proc/driver/nvidia/version is missing",
			"install NVIDIA's driver (Debian: nvidia-driver, Ubuntu: ubuntu-drivers install) and restart; nvidia-smi shows whether it works")
	case len(nodes) == 0 && !windows:
		return warn(named+" is not used: there is no /dev/nvidia0",
			"in a container: docker run --gpus all, with the NVIDIA container toolkit; else nvidia-modprobe -c 0 makes it")
	}
	for _, node := range nodes {
		f, err := os.OpenFile(node, os.O_RDWR, 0)
		if os.IsPermission(err) {
			return warn(named+" is not used: no permission for "+strings.TrimPrefix(node, strings.TrimSuffix(o.Root, "/")),
				"add this user to the group of that file (ls -l shows it), often video or render, and log in again")
		}
		if err == nil {
			f.Close()
		}
	}
	switch {
	case !e.Looked:
		why := "the engine could not be asked"
		if engineErr != nil {
			why += ": " + oneLine(engineErr)
		}
		return warn(named+" is not used: "+why, "see whether nvidia-smi answers; where it does not, the driver must be mended first. device: cpu and trainer.device: cpu keep hone from it")
	case e.Library != "" && !fileExists(e.Library):
		return warn(named+" is not used: hone's library for it is not built ("+e.Library+")",
			"make cuda builds it (CUDA toolkit 12 or 13, CMake); HONE_LIB names another directory to look in")
	}
	return warn(named+" is not used: "+strings.TrimPrefix(e.NoGPU, "no GPU: "),
		"the driver must be at least as new as the CUDA that the library was built with (nvidia-smi shows the newest that it takes), and libcudart and libcublas be found (ldd names what is missing)")
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// answers says what device comes to, for the default model.
func (o *Options) answers(e Engine, m modelState) Check {
	check := device("answers on", "device", o.Device, e)
	if o.Device == "auto" && len(e.GPUs) > 0 {
		check.Found = fmt.Sprintf("%s, where the model fits with a quarter beside it (device: auto)", e.most().Name)
		if m.size > 0 && m.size+m.size/4 >= e.most().FreeBytes {
			check.Found = fmt.Sprintf("the CPU: %s of %s does not fit into %s free on %s (device: auto)", m.name, size(m.size), size(e.most().FreeBytes), e.most().Name)
		}
	}
	return check
}

// jobs says what trainer.device comes to.
func (o *Options) jobs(e Engine) Check {
	check := device("jobs on", "trainer.device", o.TrainerDevice, e)
	if o.TrainerDevice == "auto" && len(e.GPUs) > 0 {
		check.Found = fmt.Sprintf("%s, where the job fits (trainer.device: auto; hone finetune create FILE --dry-run says)", e.most().Name)
	}
	return check
}

// most is the GPU with the most free memory.
func (e Engine) most() GPU {
	best := e.GPUs[0]
	for _, g := range e.GPUs {
		if g.FreeBytes > best.FreeBytes {
			best = g
		}
	}
	return best
}

func device(name, key, value string, e Engine) Check {
	switch {
	case value == "cuda" && len(e.GPUs) == 0:
		return Check{name, Problem, key + " is cuda, and no GPU can be used", "mend what is said of the GPU above, or set " + key + ": auto"}
	case value == "cuda":
		return Check{name, OK, fmt.Sprintf("%s (%s: cuda)", e.most().Name, key), ""}
	case value == "cpu":
		return Check{name, OK, fmt.Sprintf("the CPU (%s: cpu)", key), ""}
	}
	return Check{name, OK, fmt.Sprintf("the CPU (%s: auto; no GPU can be used)", key), ""}
}
