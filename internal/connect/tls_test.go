package connect_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
	"idempotent-orders/internal/testenv"
)

// authority makes certificates for 127.0.0.1; its own is in ca.pem.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: testenv.Dir(t)}
	a.cert, a.key = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "an authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, a.newKey()
	a.write("ca.pem", "CERTIFICATE", a.sign(a.cert, a.key))
	return a
}

func (a *authority) newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	return key
}

func (a *authority) sign(cert *x509.Certificate, key *ecdsa.PrivateKey) []byte {
	der, err := x509.CreateCertificate(rand.Reader, cert, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

func (a *authority) write(name, kind string, der []byte) string {
	file := filepath.Join(a.dir, name)
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		a.t.Fatal(err)
	}
	return file
}

// issue writes the certificate of a server at 127.0.0.1, and its key, for who owns a folder: servers refuse a key that others may read.
func (a *authority) issue(owner string) (cert, key string) {
	a.t.Helper()
	private := a.newKey()
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	key = a.write("server.key", "PRIVATE KEY", der)
	cert = a.write("server.pem", "CERTIFICATE", a.sign(&x509.Certificate{
		SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, private))
	if out, err := exec.CommandContext(a.t.Context(), "chown", "-R", "--reference="+owner, a.dir).CombinedOutput(); err != nil {
		a.t.Fatalf("%v: %s", err, out)
	}
	return cert, key
}

// The trust of a process is read once, so each kind of trust has a process of its own: this test, run again.
const trusting = "IDEMPOTENT_ORDERS_TEST_TRUSTING"

func TestTLSReachesPostgreSQLAndRedisOnlyWhereTheCertificateIsTrusted(t *testing.T) {
	if os.Getenv(trusting) != "" {
		reachAll(t)
		return
	}
	t.Parallel()
	ours, theirs := newAuthority(t), newAuthority(t)
	dir := testenv.Dir(t)
	cert, key := ours.issue(dataFolder(t, startPostgreSQL(t, dir, nil)))
	database := startPostgreSQL(t, dir, map[string]string{"ssl": "on", "ssl_cert_file": cert, "ssl_key_file": key})
	t.Cleanup(func() { _ = database.Stop(context.WithoutCancel(t.Context())) })
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = probe.Close()
	_, tlsPort, _ := net.SplitHostPort(probe.Addr().String())
	redisServer, err := local.StartRedis(t.Context(), local.RedisOptions{Dir: testenv.Dir(t), Log: slog.New(slog.DiscardHandler), Args: []string{
		"--tls-port", tlsPort, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", filepath.Join(ours.dir, "ca.pem"), "--tls-auth-clients", "no",
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = redisServer.Stop(context.WithoutCancel(t.Context())) })

	for ca, want := range map[string]string{filepath.Join(ours.dir, "ca.pem"): "trusted", filepath.Join(theirs.dir, "ca.pem"): "refused"} {
		again := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		again.Env = append(os.Environ(), trusting+"="+want, "SSL_CERT_FILE="+ca, "SSL_CERT_DIR=/nowhere",
			"TEST_DATABASE="+database.URL("postgres"), "TEST_REDIS=127.0.0.1:"+tlsPort, "TEST_REDIS_PLAIN="+redisServer.Addr())
		if out, err := again.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", want, err, out)
		}
	}
}

func startPostgreSQL(t *testing.T, dir string, settings map[string]string) *local.PostgreSQL {
	t.Helper()
	server, err := local.StartPostgreSQL(t.Context(), local.PostgreSQLOptions{Dir: dir, Log: slog.New(slog.DiscardHandler), Settings: settings})
	if err != nil {
		t.Fatal(err)
	}
	return server
}

// dataFolder returns where a server has its data, and stops the server.
func dataFolder(t *testing.T, server *local.PostgreSQL) (folder string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), server.URL("postgres"))
	if err == nil {
		err = conn.QueryRow(t.Context(), "SHOW data_directory").Scan(&folder)
		_ = conn.Close(t.Context())
	}
	if err = errors.Join(err, server.Stop(t.Context())); err != nil {
		t.Fatal(err)
	}
	return folder
}

// reachAll reaches the servers of the test that runs this one, in every way.
func reachAll(t *testing.T) {
	trusted := os.Getenv(trusting) == "trusted"
	u, err := url.Parse(os.Getenv("TEST_DATABASE"))
	if err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[string]bool{"disable": true, "prefer": true, "require": true, "verify-ca": trusted, "verify-full": trusted} {
		u.RawQuery = "sslmode=" + mode
		pool, err := connect.PostgreSQL(t.Context(), u.String())
		if (err == nil) != want {
			t.Errorf("PostgreSQL, %s: %v; want %t", mode, err, want)
		}
		if err != nil {
			if !strings.Contains(err.Error(), "certificate") {
				t.Errorf("PostgreSQL, %s: the error does not tell why: %v", mode, err)
			}
			continue
		}
		var encrypted bool
		err = pool.QueryRow(t.Context(), "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", pgx.QueryExecModeSimpleProtocol).Scan(&encrypted)
		if err != nil || encrypted != (mode != "disable") {
			t.Errorf("PostgreSQL, %s: encrypted is %t, %v", mode, encrypted, err)
		}
		pool.Close()
	}
	u.Host, u.RawQuery = "localhost:"+u.Port(), "sslmode=verify-full" // which the certificate does not name
	if _, err := connect.PostgreSQL(t.Context(), u.String()); err == nil {
		t.Error("PostgreSQL: a certificate for another name is taken")
	}
	for addr, want := range map[string]bool{
		"rediss://" + os.Getenv("TEST_REDIS"): trusted, os.Getenv("TEST_REDIS"): false,
		"rediss://" + os.Getenv("TEST_REDIS_PLAIN"): false, os.Getenv("TEST_REDIS_PLAIN"): true,
	} {
		client := connect.Redis([]string{addr}, "")
		if err := client.Ping(t.Context()).Err(); (err == nil) != want {
			t.Errorf("Redis at %s: %v; want %t", addr, err, want)
		}
		_ = client.Close()
	}
}
