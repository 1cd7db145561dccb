package testenv

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

const diesEnv = "TESTENV_DIES"

// TestAProcessThatDies starts servers, says where they are and waits for its end. It is what the test below kills.
func TestAProcessThatDies(t *testing.T) {
	if os.Getenv(diesEnv) == "" {
		return
	}
	address := DatabaseURL(t)
	_, server := Redis(t)
	fmt.Println("servers", address, server.Addr(), postgres.dir, server.dir)
	<-t.Context().Done()
}

func TestServersAndFoldersGoWithAProcessThatIsKilled(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAProcessThatDies$")
	cmd.Env = append(os.Environ(), diesEnv+"=1")
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var address, addr string
	folders := make([]string, 2)
	if _, err := fmt.Fscanf(bufio.NewReader(output), "servers %s %s %s %s\n", &address, &addr, &folders[0], &folders[1]); err != nil {
		t.Fatalf("it does not say where its servers are: %v", err)
	}
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	var lines []net.Conn
	for _, server := range []string{u.Host, addr} {
		line, err := net.Dial("tcp", server)
		if err != nil {
			t.Fatal(err)
		}
		defer line.Close()
		lines = append(lines, line)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()

	for _, line := range lines {
		_ = line.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.ReadAll(line); isTimeout(err) {
			t.Errorf("%s is still there", line.RemoteAddr())
		}
		if again, err := net.Dial("tcp", line.RemoteAddr().String()); err == nil {
			again.Close()
			t.Errorf("%s still listens", line.RemoteAddr())
		}
	}
	for _, folder := range folders {
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) { // nothing tells when a folder goes
			if _, err := os.Stat(folder); os.IsNotExist(err) {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s is still there", folder)
				break
			}
		}
	}
}

func isTimeout(err error) bool {
	timeout, ok := err.(net.Error)
	return ok && timeout.Timeout()
}
